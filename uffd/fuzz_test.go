//go:build linux

package uffd

import (
	"encoding/binary"
	"testing"
	"unsafe"
)

// FuzzMsg: whatever 32 bytes are read, each method says what the bytes say, and none panics.
func FuzzMsg(f *testing.F) {
	f.Add(make([]byte, 32))
	f.Add([]byte{0x12, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var m Msg
		if len(b) != int(unsafe.Sizeof(m)) {
			return
		}
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&m)), len(b)), b)
		arg := func(i int) uint64 { return binary.NativeEndian.Uint64(b[8+8*i:]) }
		if byte(m.Event()) != b[0] || uint64(m.Flags()) != arg(0) || m.Address() != arg(1) || m.ThreadID() != uint32(arg(2)) {
			t.Fatalf("% x: event %v, flags %v, address %#x, thread %d", b, m.Event(), m.Flags(), m.Address(), m.ThreadID())
		}
		if m.From() != arg(0) || m.To() != arg(1) || m.Length() != arg(2) || m.Fd() != int(uint32(arg(0))) {
			t.Fatalf("% x: from %#x to %#x, %d bytes, fd %d", b, m.From(), m.To(), m.Length(), m.Fd())
		}
		_, _, _ = m.String(), m.Event().String(), m.Flags().String()
	})
}
