package ipc

import (
	"encoding/binary"
	"fmt"
)

// HeaderSize is the size of a Header on the wire, in bytes.
const HeaderSize = 16

// Header is what every frame begins with: fixed, little-endian, the same in all versions.
type Header struct {
	Version uint16 // Version of the sender
	Type    Type   // what the body is
	Seq     uint32 // number of the request, chosen by who calls, echoed in the reply
	Length  uint32 // bytes of body and tail; the frame is exactly HeaderSize+Length long
	Flags   uint16 // FlagReply, FlagResend
	FDs     uint16 // file descriptors that come with the frame
}

// FlagReply marks a reply. Each end numbers its own calls, so a seq means nothing without it.
const FlagReply uint16 = 1 << 0

// FlagResend marks a request that was sent before, with the same Seq, to a pager that died: it may have been done, and must not be done twice. See TypeRestarted.
const FlagResend uint16 = 1 << 1

// Resent reports whether the request was sent before, to a pager that died.
func (h Header) Resent() bool { return h.Flags&FlagResend != 0 }

// Reply reports whether the frame answers a call.
func (h Header) Reply() bool { return h.Flags&FlagReply != 0 }

func (h Header) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint16(b, h.Version)
	b = binary.LittleEndian.AppendUint16(b, uint16(h.Type))
	b = binary.LittleEndian.AppendUint32(b, h.Seq)
	b = binary.LittleEndian.AppendUint32(b, h.Length)
	b = binary.LittleEndian.AppendUint16(b, h.Flags)
	return binary.LittleEndian.AppendUint16(b, h.FDs)
}

// ParseHeader reads the header of a frame and checks what it says about the frame itself. The header is valid wherever the error is not about
// its size, so that a refusal can be sent to the right call.
func ParseHeader(frame []byte) (Header, error) {
	if len(frame) < HeaderSize {
		return Header{}, fmt.Errorf("parse frame: %d bytes are no header of %d: %w", len(frame), HeaderSize, ErrMalformed)
	}
	h := Header{
		Version: binary.LittleEndian.Uint16(frame[0:]),
		Type:    Type(binary.LittleEndian.Uint16(frame[2:])),
		Seq:     binary.LittleEndian.Uint32(frame[4:]),
		Length:  binary.LittleEndian.Uint32(frame[8:]),
		Flags:   binary.LittleEndian.Uint16(frame[12:]),
		FDs:     binary.LittleEndian.Uint16(frame[14:]),
	}
	switch {
	case h.Version != Version:
		return h, fmt.Errorf("parse frame: the other end speaks version %d, this one version %d (run the same release of machpager on both): %w",
			h.Version, Version, ErrVersion)
	case uint64(h.Length) != uint64(len(frame)-HeaderSize):
		return h, fmt.Errorf("parse frame: %v says %d bytes of body, %d came: %w", h.Type, h.Length, len(frame)-HeaderSize, ErrMalformed)
	case h.Flags&^(FlagReply|FlagResend) != 0 || h.Flags == FlagReply|FlagResend:
		return h, fmt.Errorf("parse frame: %v with flags %#x, unknown or at odds: %w", h.Type, h.Flags, ErrMalformed)
	}
	return h, nil
}
