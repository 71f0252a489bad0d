package emm

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
)

// Port names a memory object: a capability of 128 random bits. Whoever presents it has the access that goes with it, so it is not to be
// logged: fmt's %v and slog do not show it. The zero Port names nothing (Mach: MACH_PORT_NULL).
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

// String is the port as 32 hexadecimal digits: the capability itself, to be handed to who is to have it.
func (p Port) String() string { return hex.EncodeToString(p[:]) }

// redacted is what there is to see of a port where nobody asked for the capability itself.
const redacted = "port(not shown)"

// Format writes the digits for %s, %q and %x alone. %v, and so Print and every struct that has a port in it, says that there is a port and not which.
func (p Port) Format(f fmt.State, verb rune) {
	switch {
	case verb == 's' || verb == 'q':
		fmt.Fprintf(f, fmt.FormatString(f, verb), p.String())
	case verb == 'x' || verb == 'X':
		fmt.Fprintf(f, fmt.FormatString(f, verb), p[:])
	case p.IsNull():
		io.WriteString(f, "port(null)")
	default:
		io.WriteString(f, redacted)
	}
}

// LogValue keeps the capability out of logs.
func (p Port) LogValue() slog.Value { return slog.StringValue(fmt.Sprintf("%v", p)) }

// IsNull reports whether p names nothing.
func (p Port) IsNull() bool { return p == Port{} }

// Equal compares in constant time.
func (p Port) Equal(q Port) bool { return subtle.ConstantTimeCompare(p[:], q[:]) == 1 }
