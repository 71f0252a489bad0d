package emm

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
)

// Port names a memory object: a capability of 128 random bits. Whoever presents it has full access to the object, so it is not to be
// logged. The zero Port names nothing (Mach: MACH_PORT_NULL).
type Port [16]byte

// NewPort makes a port nobody can guess.
func NewPort() Port {
	var p Port
	rand.Read(p[:]) // never fails: crypto/rand ends the program instead
	return p
}

// ParsePort reads what String wrote: 32 hexadecimal digits.
func ParsePort(s string) (Port, error) {
	var p Port
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(p) {
		return Port{}, fmt.Errorf("parse port: want %d hexadecimal digits, got %d characters: %w", 2*len(p), len(s), InvalidArgument)
	}
	copy(p[:], b)
	return p, nil
}

// String is the port as 32 hexadecimal digits: the capability itself.
func (p Port) String() string { return hex.EncodeToString(p[:]) }

// IsNull reports whether p names nothing.
func (p Port) IsNull() bool { return p == Port{} }

// Equal compares in constant time.
func (p Port) Equal(q Port) bool { return subtle.ConstantTimeCompare(p[:], q[:]) == 1 }
