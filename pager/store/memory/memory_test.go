package memory_test

import (
	"bytes"
	"errors"
	"testing"

	"machpager/pager/store"
	"machpager/pager/store/memory"
	"machpager/pager/store/storetest"
)

const groupSize = store.GroupSlots * (store.SlotSize + 4) // see the package comment

var made = map[store.Store]store.Memory{}

func harness(slack int64) storetest.Harness {
	return storetest.Harness{
		New: func(t testing.TB, capacity int64) store.Store {
			mem := anonymous(t)
			s, err := memory.New(mem, &memory.Options{Capacity: capacity, Slack: slack})
			if err != nil {
				t.Fatal(err)
			}
			made[s] = mem
			t.Cleanup(func() { delete(made, s) })
			return s
		},
		Corrupt: func(_ testing.TB, s store.Store, slot store.Slot) { at(made[s], slot)[1234] ^= 0x10 },
	}
}

func anonymous(t testing.TB) store.Memory {
	t.Helper()
	mem, err := store.NewAnonymous(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	return mem
}

// at is where the layout in the package comment puts a slot's contents.
func at(mem store.Memory, slot store.Slot) []byte {
	i := int64(slot - 1)
	return mem.Bytes()[i/store.GroupSlots*groupSize+store.GroupSlots*4+i%store.GroupSlots*store.SlotSize:][:store.SlotSize]
}

func TestConformance(t *testing.T)        { storetest.Run(t, harness(0)) }
func TestConformanceNoSlack(t *testing.T) { storetest.Run(t, harness(-1)) }

// watched tells what was discarded.
type watched struct {
	store.Memory
	discarded int64
	noGrow    error
}

func (w *watched) Discard(off, n int64) error {
	w.discarded += n
	return w.Memory.Discard(off, n)
}

func (w *watched) Grow(size int64) error {
	if w.noGrow != nil {
		return w.noGrow
	}
	return w.Memory.Grow(size)
}

func write(t *testing.T, s store.Store, n int, seed uint64) store.Slot {
	t.Helper()
	slot, m, err := s.Alloc(n, n)
	if err != nil || m != n {
		t.Fatalf("alloc %d: %d, %v", n, m, err)
	}
	b := make([]byte, n*store.SlotSize)
	storetest.Fill(b, seed)
	if _, err := storetest.Do(t, s.Write, slot, b); err != nil {
		t.Fatal(err)
	}
	return slot
}

func TestFreedMemoryIsGivenBack(t *testing.T) {
	for _, c := range []struct{ slack, least, most int64 }{{-1, 512, 512}, {100 * store.SlotSize, 412, 511}, {1 << 30, 0, 0}} {
		mem := &watched{Memory: anonymous(t)}
		s, err := memory.New(mem, &memory.Options{Slack: c.slack})
		if err != nil {
			t.Fatal(err)
		}
		slot := write(t, s, 512, 1)
		for i := range store.Slot(512) {
			s.Free(slot+i, 1)
		}
		if got := mem.discarded / store.SlotSize; got < c.least || got > c.most {
			t.Errorf("slack %d: %d of 512 freed slots were given back, want %d to %d", c.slack, got, c.least, c.most)
		}
		if c.slack < 0 && !bytes.Equal(at(mem, slot), make([]byte, store.SlotSize)) {
			t.Error("a discarded slot is not zeros")
		}
		s.Close()
	}
}

func TestMemoryThatCannotGrow(t *testing.T) {
	boom := errors.New("no more memory")
	mem := &watched{Memory: anonymous(t), noGrow: boom}
	s, err := memory.New(mem, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for range 3 {
		if _, _, err := s.Alloc(1, 1); !errors.Is(err, store.ErrNoSpace) || !errors.Is(err, boom) {
			t.Fatalf("alloc: %v, want ErrNoSpace and the cause", err)
		}
	}
	if i := s.Info(); i.Used != 0 {
		t.Errorf("%d bytes leaked", i.Used)
	}
	mem.noGrow = nil
	write(t, s, 512, 1)
}

// A store is restarted on the memory of one that was abandoned at any moment.
func TestRestart(t *testing.T) {
	mem := &watched{Memory: anonymous(t)}
	o := &memory.Options{Slack: -1}
	first, err := memory.New(mem, o)
	if err != nil {
		t.Fatal(err)
	}
	kept := write(t, first, 512, 1)
	lost := write(t, first, 512, 2)
	mem.discarded = 0

	second, err := memory.New(mem, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Rebuild(func(yield func(store.Slot, int) bool) { yield(kept, 512) }); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 512*store.SlotSize)
	storetest.Fill(want, 1)
	if b, err := second.View(kept, 512); err != nil || !bytes.Equal(b, want) {
		t.Errorf("view of what was kept: %d bytes, %v", len(b), err)
	}
	if mem.discarded < 512*store.SlotSize || !bytes.Equal(at(mem, lost), make([]byte, store.SlotSize)) {
		t.Errorf("the memory of slots that no map names was not given back: %d bytes", mem.discarded)
	}
	if i := second.Info(); i.Used != 512*store.SlotSize {
		t.Errorf("info: %+v", i)
	}
	second.Close()
}

// A run that lies in two groups is not lent, and read and written all the same.
func TestAcrossGroups(t *testing.T) {
	s, err := memory.New(anonymous(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for range 2 * store.GroupSlots / 512 {
		if _, m, err := s.Alloc(512, 512); m != 512 || err != nil {
			t.Fatal(m, err)
		}
	}
	want := make([]byte, 8*store.SlotSize)
	storetest.Fill(want, 5)
	const slot = store.GroupSlots - 3
	if _, err := storetest.Do(t, s.Write, slot, want); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := storetest.Do(t, s.Read, slot, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read across groups: %v", err)
	}
	if b, err := s.View(slot, 8); b != nil || err != nil {
		t.Errorf("view across groups: %d bytes, %v", len(b), err)
	}
	s.Free(slot, 8)
}

func TestOptions(t *testing.T) {
	for _, capacity := range []int64{-1, 1, 4095} {
		if _, err := memory.New(anonymous(t), &memory.Options{Capacity: capacity}); err == nil {
			t.Errorf("capacity %d: no error", capacity)
		}
	}
}

func BenchmarkView(b *testing.B) {
	s, err := memory.New(anonymous(b), nil)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	slot, n, err := s.Alloc(512, 512)
	if err != nil || n != 512 {
		b.Fatal(n, err)
	}
	storetest.Do(b, s.Write, slot, bytes.Repeat([]byte{1}, 512*store.SlotSize))
	b.SetBytes(store.SlotSize)
	for i := range b.N {
		if _, err := s.View(slot+store.Slot(i%512), 1); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAllocFree(b *testing.B) {
	s, err := memory.New(anonymous(b), nil)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for range b.N {
		slot, n, _ := s.Alloc(1, 1)
		s.Free(slot, n)
	}
}
