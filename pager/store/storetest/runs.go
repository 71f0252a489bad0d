package storetest

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"machpager/pager/store"
)

func testRoundTrip(t *testing.T, h Harness) {
	s := h.open(t, 0)
	for _, n := range []int{1, 2, 3, 16, 511, 512} {
		slot, m := alloc(t, s, n, 1)
		want := contents(m, uint64(n))
		write(t, s, slot, want)
		expect(t, s, slot, want)
		for i := range min(m, 5) { // any part can be read alone
			expect(t, s, slot+store.Slot(i), want[i*store.SlotSize:(i+1)*store.SlotSize])
		}
		expect(t, s, slot+store.Slot(m/2), want[m/2*store.SlotSize:])
	}
	slot, _ := alloc(t, s, 1, 1)
	zero := make([]byte, store.SlotSize)
	write(t, s, slot, zero)
	expect(t, s, slot, zero)
}

func testContiguousRuns(t *testing.T, h Harness) {
	s := h.open(t, 0)
	used := map[store.Slot]bool{}
	for i := range 8 {
		slot, m := alloc(t, s, 512, 512)
		if m != 512 {
			t.Fatalf("alloc 512 slots in a fresh store: got %d", m)
		}
		for j := range store.Slot(m) {
			if used[slot+j] {
				t.Fatalf("slot %d was given twice", slot+j)
			}
			used[slot+j] = true
		}
		write(t, s, slot, contents(m, uint64(i)))
		one, _ := alloc(t, s, 1, 1)
		if used[one] {
			t.Fatalf("slot %d was given twice", one)
		}
		used[one] = true
	}
	if i := s.Info(); i.Used != int64(len(used))*store.SlotSize {
		t.Errorf("info: %d bytes used, want %d", i.Used, len(used)*store.SlotSize)
	}
}

func testOverwriteByNew(t *testing.T, h Harness) {
	s := h.open(t, 0)
	old, _ := alloc(t, s, 4, 1)
	first := contents(4, 1)
	write(t, s, old, first)
	for v := range uint64(50) { // new contents in new slots: the old ones are there until they are freed
		next, m := alloc(t, s, 4, 4)
		second := contents(m, v+2)
		write(t, s, next, second)
		expect(t, s, old, first)
		expect(t, s, next, second)
		s.Free(old, 4)
		old, first = next, second
		expect(t, s, old, first)
	}
	if i := s.Info(); i.Used != 4*store.SlotSize {
		t.Errorf("info: %d bytes used, want %d", i.Used, 4*store.SlotSize)
	}
}

func testFreeAndReuse(t *testing.T, h Harness) {
	const capacity = 1024
	s := h.open(t, capacity*store.SlotSize)
	rng := rand.New(rand.NewPCG(1, 2))
	have := map[store.Slot]uint64{}
	version := uint64(0)
	for round := range 200 {
		if rng.IntN(2) == 0 {
			n := 1 + rng.IntN(40)
			slot, m, err := s.Alloc(n, 1)
			if err != nil {
				if !errors.Is(err, store.ErrNoSpace) || len(have) < capacity {
					t.Fatalf("round %d: alloc %d with %d of %d used: %v", round, n, len(have), capacity, err)
				}
				continue
			}
			for i := range store.Slot(m) {
				if _, ok := have[slot+i]; ok {
					t.Fatalf("round %d: slot %d was given twice", round, slot+i)
				}
				version++
				have[slot+i] = version
				write(t, s, slot+i, contents(1, version))
			}
		} else {
			for slot := range have {
				if rng.IntN(3) == 0 {
					expect(t, s, slot, contents(1, have[slot]))
					s.Free(slot, 1)
					delete(have, slot)
				}
			}
		}
	}
	for slot, v := range have {
		expect(t, s, slot, contents(1, v))
	}
	if i := s.Info(); i.Used != int64(len(have))*store.SlotSize || i.Used+i.Free != i.Total {
		t.Errorf("info: %+v, want %d slots used", i, len(have))
	}
}

func testFragmentation(t *testing.T, h Harness) {
	const capacity = 256
	s := h.open(t, capacity*store.SlotSize)
	var all []store.Slot
	for range capacity {
		slot, _ := alloc(t, s, 1, 1)
		all = append(all, slot)
	}
	slices.Sort(all)
	for i := 0; i < capacity; i += 2 {
		s.Free(all[i], 1)
	}
	if _, m := alloc(t, s, 16, 1); m != 1 {
		t.Errorf("alloc 16 by 1 where no two are in a row: got %d", m)
	}
	if _, _, err := s.Alloc(16, 2); !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("alloc by 2 where no two are in a row: %v, want ErrNoSpace", err)
	}
	s.Free(all[101], 1) // with its neighbours a run of three, whichever of them is free
	s.Free(all[103], 1)
	if _, m := alloc(t, s, 16, 2); m%2 != 0 || m > 4 {
		t.Errorf("alloc 16 by 2: got %d", m)
	}
}

func testCapacity(t *testing.T, h Harness) {
	s := h.open(t, 64*store.SlotSize)
	if i := s.Info(); i.Total != 64*store.SlotSize || i.Free != i.Total {
		t.Fatalf("info of an empty store: %+v", i)
	}
	slot, m := alloc(t, s, 64, 1)
	want := contents(m, 9)
	write(t, s, slot, want)
	if m != 64 {
		t.Fatalf("alloc all: got %d", m)
	}
	for range 3 {
		if _, _, err := s.Alloc(1, 1); !errors.Is(err, store.ErrNoSpace) {
			t.Fatalf("alloc in a full store: %v, want ErrNoSpace", err)
		}
	}
	expect(t, s, slot, want)
	s.Free(slot+10, 2)
	got, m := alloc(t, s, 64, 1)
	if got != slot+10 || m != 2 {
		t.Fatalf("alloc after freeing %d+2: got %d+%d", slot+10, got, m)
	}
	expect(t, s, slot, want[:10*store.SlotSize])
	expect(t, s, slot+12, want[12*store.SlotSize:])
}
