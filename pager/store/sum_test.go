package store

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"testing"
)

// TestSum compares with the standard library: each bit of a slot, random slots, and slots at any address.
func TestSum(t *testing.T) {
	same := func(what string, slot []byte) {
		t.Helper()
		if got, want := Sum(slot), crc32.Checksum(slot, crc32.MakeTable(crc32.Castagnoli)); got != want {
			t.Fatalf("%s: %08x instead of %08x", what, got, want)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	slot := make([]byte, SlotSize)
	same("zeros", slot)
	for bit := range 8 * SlotSize {
		slot[bit/8] ^= 1 << (bit % 8)
		same("one bit", slot)
		slot[bit/8] = 0
	}
	area := make([]byte, SlotSize+64)
	for range 1000 {
		for i := 0; i < len(area); i += 8 {
			binary.LittleEndian.PutUint64(area[i:], r.Uint64())
		}
		n := r.IntN(65)
		same("random", area[n:n+SlotSize])
	}
	for _, n := range []int{0, 1, 63, 512, SlotSize - 1, SlotSize + 1} {
		same("another length", area[:n])
	}
}

// TestCheckSums finds the first slot that is not what it was.
func TestCheckSums(t *testing.T) {
	const n = 5
	data, sums := make([]byte, n*SlotSize), make([]byte, n*4)
	for i := range data {
		data[i] = byte(i / 7)
	}
	PutSums(sums, data)
	if good, err := CheckSums(sums, data, 1); good != n || err != nil {
		t.Fatalf("%d good, %v", good, err)
	}
	for i := range n {
		data[i*SlotSize+17] ^= 8
		if good, err := CheckSums(sums, data, 1); good != i || !errors.Is(err, ErrCorrupt) {
			t.Errorf("slot %d changed: %d good, %v", i, good, err)
		}
		data[i*SlotSize+17] ^= 8
	}
}

func BenchmarkSum(b *testing.B) {
	for name, n := range map[string]int{"cached": 1, "memory": 1 << 15} {
		b.Run(name, func(b *testing.B) {
			data := make([]byte, n*SlotSize)
			for i := range data {
				data[i] = byte(i)
			}
			b.SetBytes(SlotSize)
			i := 0
			for b.Loop() {
				Sum(data[i*SlotSize:][:SlotSize])
				if i++; i == n {
					i = 0
				}
			}
		})
	}
}
