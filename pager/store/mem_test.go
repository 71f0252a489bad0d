package store

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAnonymous(t *testing.T) {
	m, err := NewAnonymous(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Bytes()) != 0 || len(m.Words()) != 0 {
		t.Fatal("new memory is not empty")
	}
	if err := m.Grow(5000); err != nil {
		t.Fatal(err)
	}
	early := m.Bytes()
	if len(early) != 8192 || len(m.Words()) != 1024 {
		t.Fatalf("after growing to 5000: %d bytes, %d words", len(early), len(m.Words()))
	}
	m.Words()[1].Store(0x0102030405060708)
	if err := m.Grow(1 << 20); err != nil {
		t.Fatal(err)
	}
	if &early[0] != &m.Bytes()[0] || m.Bytes()[8] != 8 || early[15] != 1 {
		t.Error("growing moved the memory, or words are not little endian")
	}
	m.Bytes()[1<<20-1] = 1
	if err := m.Grow(100); err != nil || len(m.Bytes()) != 1<<20 {
		t.Errorf("growing to less: %v, %d bytes", err, len(m.Bytes()))
	}
	if err := m.Grow(1<<20 + 1); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("growing beyond what is reserved: %v", err)
	}
	if err := m.Discard(0, 4096); err != nil || m.Words()[1].Load() != 0 || m.Bytes()[1<<20-1] != 1 {
		t.Errorf("discard: %v", err)
	}
	for _, c := range [][2]int64{{1, 4096}, {0, 1}, {-4096, 4096}, {0, 2 << 20}, {0, -4096}} {
		if err := m.Discard(c[0], c[1]); err == nil {
			t.Errorf("discard %d+%d: no error", c[0], c[1])
		}
	}
	if err := m.Discard(0, 0); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	if len(m.Bytes()) != 0 || m.Grow(1) == nil {
		t.Error("closed memory can be used")
	}
}
