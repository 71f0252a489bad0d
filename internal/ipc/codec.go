package ipc

import (
	"encoding/binary"
	"fmt"
)

// AppendFixed appends a fixed struct.
func AppendFixed(b []byte, fixed any) ([]byte, error) {
	b, err := binary.Append(b, binary.LittleEndian, fixed)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", fixed, err)
	}
	return b, nil
}

// Decode reads the fixed struct at the start of a body. The tail is what follows, aliasing body.
func Decode[T any](body []byte) (fixed T, tail []byte, err error) {
	n, err := binary.Decode(body, binary.LittleEndian, &fixed)
	if err != nil {
		return fixed, nil, fmt.Errorf("decode %T from %d bytes: %w", fixed, len(body), ErrMalformed)
	}
	return fixed, body[n:], nil
}

// AppendStrings makes a TailStrings: each string as u16 length and bytes.
func AppendStrings(b []byte, s ...string) ([]byte, error) {
	for _, s := range s {
		if len(s) > MaxBody {
			return nil, fmt.Errorf("encode string of %d bytes: more than a frame holds (%d): %w", len(s), MaxBody, ErrMalformed)
		}
		b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
		b = append(b, s...)
	}
	return b, nil
}

// DecodeStrings reads a tail of exactly n strings.
func DecodeStrings(tail []byte, n int) ([]string, error) {
	s := make([]string, n)
	for i := range s {
		if len(tail) < 2 {
			return nil, fmt.Errorf("decode strings: %d of %d came: %w", i, n, ErrMalformed)
		}
		l := int(binary.LittleEndian.Uint16(tail))
		if tail = tail[2:]; len(tail) < l {
			return nil, fmt.Errorf("decode strings: string %d has %d bytes, %d came: %w", i, l, len(tail), ErrMalformed)
		}
		s[i], tail = string(tail[:l]), tail[l:]
	}
	if len(tail) != 0 {
		return nil, fmt.Errorf("decode strings: %d bytes behind %d strings: %w", len(tail), n, ErrMalformed)
	}
	return s, nil
}

// AppendList makes a TailList of fixed structs.
func AppendList[T any](b []byte, list []T) ([]byte, error) {
	for i := range list {
		var err error
		if b, err = AppendFixed(b, &list[i]); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// DecodeList reads a tail of fixed structs.
func DecodeList[T any](tail []byte) ([]T, error) {
	var zero T
	size := binary.Size(zero)
	if size <= 0 || len(tail)%size != 0 {
		return nil, fmt.Errorf("decode list of %T: %d bytes are no multiple of %d: %w", zero, len(tail), size, ErrMalformed)
	}
	list := make([]T, len(tail)/size)
	for i := range list {
		if _, err := binary.Decode(tail[i*size:], binary.LittleEndian, &list[i]); err != nil {
			return nil, fmt.Errorf("decode %T: %w", zero, ErrMalformed)
		}
	}
	return list, nil
}
