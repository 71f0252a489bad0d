package compressed

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

func open(t testing.TB, o Options) *Store {
	t.Helper()
	s, err := New(&o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// flip changes one bit of what is stored of a slot, where the package comment says it is.
func flip(t testing.TB, s store.Store, slot store.Slot) {
	c := s.(*Store)
	w := c.index.mem.Words()[(slot-1)*2].Load()
	class, length, piece, slab := int(w>>2&0x3f), int(w>>8&0x1fff), int(w>>21&0x7ff), int(w>>32)
	if w&3 < 2 {
		t.Fatalf("slot %d has no piece", slot)
	}
	c.slabs.mem.Bytes()[(slab-1)<<16+piece*sizes[class]+length*2/3] ^= 0x10
}

func harness(o Options) storetest.Harness {
	return storetest.Harness{
		New: func(t testing.TB, capacity int64) store.Store {
			o := o
			o.Capacity = capacity
			return open(t, o)
		},
		Corrupt: flip,
	}
}

func TestConformance(t *testing.T) {
	for name, o := range map[string]Options{"default": {}, "no slack": {Slack: -1}, "limit": {Limit: 256 << 20}} {
		t.Run(name, func(t *testing.T) { storetest.Run(t, harness(o)) })
	}
}

// page makes contents that S2 makes about percent of a page of.
func page(b []byte, percent int, seed uint64) {
	clear(b)
	storetest.Fill(b[:min(store.SlotSize*percent/100&^7, store.SlotSize)], seed)
	b[store.SlotSize-1] = 1
}

func alloc(t testing.TB, s store.Store, n int) store.Slot {
	t.Helper()
	slot, m, err := s.Alloc(n, n)
	if err != nil || m != n {
		t.Fatal(m, err)
	}
	return slot
}

func write(t testing.TB, s store.Store, slot store.Slot, b []byte) {
	t.Helper()
	if _, err := storetest.Do(t, s.Write, slot, b); err != nil {
		t.Fatal(err)
	}
}

func expect(t testing.TB, s store.Store, slot store.Slot, want []byte) {
	t.Helper()
	got := bytes.Repeat([]byte{0xee}, len(want))
	if _, err := storetest.Do(t, s.Read, slot, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("slot %d: wrong contents", slot)
	}
}

// verify checks all that the store knows against each other. Nobody else uses it.
func verify(t testing.TB, s *Store) {
	t.Helper()
	type at struct{ slab, piece int }
	named := map[at]store.Slot{}
	var bytes int64
	s.index.each(func(i int, w where) {
		if !w.hasPiece() {
			return
		}
		k := at{int(w.slab()), w.piece()}
		if named[k] != 0 {
			t.Errorf("slots %d and %d are in one piece", named[k], i+1)
		}
		named[k] = store.Slot(i + 1)
		bytes += int64(w.length())
	})
	if got := s.Stats().Bytes; got != bytes {
		t.Errorf("stats: %d bytes, the index says %d", got, bytes)
	}
	slabs := int64(0)
	for i := range s.slabs.classes {
		c := &s.slabs.classes[i]
		free, n, listed := 0, 0, 0
		for b := range c.partly {
			for sl := c.partly[b]; sl != nil; sl = sl.next {
				listed++
				if sl.bucket != b || sl.used*buckets/c.n != b {
					t.Errorf("class %d: a slab with %d of %d used is in list %d", i, sl.used, c.n, b)
				}
			}
		}
		for _, sl := range *s.slabs.table.Load() {
			if sl.class != i {
				continue
			}
			n++
			free += c.n - sl.used
			if sl.bucket < 0 && sl.used < c.n && sl != c.victim {
				t.Errorf("class %d: a slab with %d of %d used is in no list", i, sl.used, c.n)
			}
			if sl.bucket >= 0 {
				listed--
			}
			for p := range c.n {
				used := sl.free[p/64]>>(p%64)&1 == 0
				slot, ok := named[at{int(sl.number), p}]
				if used != ok || ok && sl.owners[p] != slot {
					t.Errorf("class %d slab %d piece %d: used %v by slot %d, the index says %d", i, sl.number, p, used, sl.owners[p], slot)
				}
			}
		}
		if n != c.slabs || free != c.free || listed != 0 {
			t.Errorf("class %d: counts say %d slabs and %d free, there are %d and %d (%d too many listed)", i, c.slabs, c.free, n, free, listed)
		}
		if c.free > c.n+c.slabs*c.n/8+2 {
			t.Errorf("class %d: %d of %d pieces are free", i, c.free, c.slabs*c.n)
		}
		slabs += int64(n)
	}
	if got := s.slabs.inUse(); got != slabs {
		t.Errorf("%d slabs are in use, the classes have %d", got, slabs)
	}
}

// Random overwrites with pages of all sizes, in the pager's way: new slot first. What is free inside of slabs stays within its bounds.
func TestFragmentationIsBounded(t *testing.T) {
	const pages = 8192
	s := open(t, Options{})
	rng := rand.New(rand.NewPCG(1, 1))
	slots, seeds := make([]store.Slot, pages), make([][2]int, pages)
	b := make([]byte, store.SlotSize)
	put := func(i, percent int) {
		next := alloc(t, s, 1)
		seeds[i] = [2]int{percent, rng.IntN(1 << 30)}
		page(b, percent, uint64(seeds[i][1]))
		write(t, s, next, b)
		if slots[i] != 0 {
			s.Free(slots[i], 1)
		}
		slots[i] = next
	}
	for i := range slots {
		put(i, rng.IntN(101))
	}
	// A piece is a sixteenth larger than what is in it at most, or 16 bytes; an eighth of a class's pieces is free; and a slab of each class.
	bound := func(st Stats) int64 { return (st.Bytes+16*pages)*17/16*8/7 + int64(len(sizes))*slabSize }
	for round := range 4 { // what is stored changes its size over and over
		for range pages {
			put(rng.IntN(pages), rng.IntN(20*(round+1)+1))
		}
		st := s.Stats()
		t.Logf("round %d: %d KiB in %d KiB of slabs: %.3f; %d moved", round, st.Bytes>>10, st.Memory>>10, float64(st.Memory)/float64(st.Bytes), st.Moved)
		if st.Memory > bound(st) {
			t.Errorf("slabs take %d bytes, %d at most were promised", st.Memory, bound(st))
		}
	}
	verify(t, s)
	for i, slot := range slots {
		page(b, seeds[i][0], uint64(seeds[i][1]))
		expect(t, s, slot, b)
	}
	for _, slot := range slots {
		s.Free(slot, 1)
	}
	verify(t, s)
	if st := s.Stats(); st.Memory != 0 || st.Bytes != 0 || st.Packed+st.Raw+st.Zeros != 0 {
		t.Errorf("empty again: %+v", st)
	}
}

// A full store has room for other sizes as soon as anything of it was freed, wherever it was.
func TestLimit(t *testing.T) {
	s := open(t, Options{Limit: 4 << 20, Slack: -1})
	b := make([]byte, store.SlotSize)
	fill := func(percent int) (slots []store.Slot) {
		for i := 0; ; i++ {
			slot := alloc(t, s, 1)
			page(b, percent, uint64(i))
			if _, err := storetest.Do(t, s.Write, slot, b); err != nil {
				if !errors.Is(err, store.ErrNoSpace) {
					t.Fatal(err)
				}
				s.Free(slot, 1)
				return slots
			}
			slots = append(slots, slot)
		}
	}
	small := fill(25)
	if len(small) < 3*1024 {
		t.Fatalf("%d pages of a quarter fit into 4 MiB", len(small))
	}
	if i := s.Info(); i.Free != 0 || i.Used != int64(len(small))*store.SlotSize || i.Total != i.Used {
		t.Errorf("info of a full store: %+v", i)
	}
	if st := s.Stats(); st.Memory > 4<<20 {
		t.Errorf("%d bytes in use", st.Memory)
	}
	var kept []store.Slot
	for i, slot := range small { // holes everywhere
		if i%2 == 0 {
			s.Free(slot, 1)
		} else {
			kept = append(kept, slot)
		}
	}
	verify(t, s)
	large := fill(100)
	if len(large) < 400 {
		t.Errorf("%d whole pages fit where 2 MiB were freed", len(large))
	}
	more := fill(10)
	verify(t, s)
	for i, slot := range small {
		if i%2 == 1 {
			page(b, 25, uint64(i))
			expect(t, s, slot, b)
		}
	}
	for _, slots := range [][]store.Slot{kept, large, more} {
		for _, slot := range slots {
			s.Free(slot, 1)
		}
	}
	verify(t, s)
	if i := s.Info(); i.Free != 4<<20 || i.Used != 0 {
		t.Errorf("info of an emptied store: %+v", i)
	}
}

// watched counts the bytes of memory that were discarded and not used again.
type watched struct {
	store.Memory
	discarded atomic.Int64
	noGrow    atomic.Pointer[error]
}

func (w *watched) Discard(off, n int64) error {
	w.discarded.Add(n)
	return w.Memory.Discard(off, n)
}

func (w *watched) Grow(size int64) error {
	if err := w.noGrow.Load(); err != nil {
		return *err
	}
	return w.Memory.Grow(size)
}

func anonymous(t testing.TB) *watched {
	t.Helper()
	m, err := store.NewAnonymous(1 << 32)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return &watched{Memory: m}
}

func TestFreedMemoryIsGivenBack(t *testing.T) {
	index, data := anonymous(t), anonymous(t)
	s := open(t, Options{Index: index, Data: data, Slack: 1 << 20})
	b := make([]byte, 512*store.SlotSize)
	storetest.Fill(b, 1)
	var runs []store.Slot
	for range 256 { // 512 MiB of slots, so that the index has something to give back; 8 MiB of contents
		slot := alloc(t, s, 512)
		write(t, s, slot, b[:8*store.SlotSize])
		runs = append(runs, slot)
	}
	for _, slot := range runs {
		s.Free(slot, 512)
	}
	if got := data.discarded.Load(); got < 7<<20 || got > 8<<20 {
		t.Errorf("8 MiB were freed with a slack of 1 MiB, and %d bytes given back", got)
	}
	if got := index.discarded.Load(); got < 1<<20 {
		t.Errorf("131072 slots were freed, and %d bytes of index given back", got)
	}
	write(t, s, alloc(t, s, 512), b) // what was given back is used again
}

func TestMemoryThatCannotGrow(t *testing.T) {
	boom := errors.New("no more memory")
	index, data := anonymous(t), anonymous(t)
	s := open(t, Options{Index: index, Data: data})
	index.noGrow.Store(&boom)
	if _, _, err := s.Alloc(1, 1); !errors.Is(err, store.ErrNoSpace) || !errors.Is(err, boom) {
		t.Errorf("alloc: %v", err)
	}
	index.noGrow.Store(nil)
	data.noGrow.Store(&boom)
	b := make([]byte, store.SlotSize)
	storetest.Fill(b, 1)
	slot := alloc(t, s, 1)
	if _, err := storetest.Do(t, s.Write, slot, b); !errors.Is(err, store.ErrNoSpace) || !errors.Is(err, boom) {
		t.Errorf("write: %v", err)
	}
	data.noGrow.Store(nil)
	write(t, s, slot, b)
	expect(t, s, slot, b)
	s.Free(slot, 1)
	verify(t, s)
}

// Readers read while what they read is moved, again and again.
func TestReadersOfWhatIsMoved(t *testing.T) {
	const kept = 512
	s := open(t, Options{Slack: -1})
	want := make([]byte, kept*store.SlotSize)
	for i := range kept {
		page(want[i*store.SlotSize:(i+1)*store.SlotSize], 40, uint64(i))
	}
	var slots []store.Slot
	for i := range kept {
		slots = append(slots, alloc(t, s, 1))
		write(t, s, slots[i], want[i*store.SlotSize:(i+1)*store.SlotSize])
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	var failed atomic.Pointer[string]
	for r := range 3 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(r), 1))
			got := make([]byte, store.SlotSize)
			op := store.Op{Data: got, Done: func(*store.Op) {}}
			for !stop.Load() {
				i := rng.IntN(kept)
				op.Slot = slots[i]
				s.Read(&op)
				if op.Err != nil || !bytes.Equal(got, want[i*store.SlotSize:(i+1)*store.SlotSize]) {
					msg := fmt.Sprintf("slot %d: %v", slots[i], op.Err)
					failed.Store(&msg)
					return
				}
			}
		})
	}
	for w := range 2 { // fill with pages of the same size, free most of them: the kept ones are scattered and must move
		wg.Go(func() {
			b := make([]byte, store.SlotSize)
			done := make(chan struct{}, 1)
			for round := 0; !stop.Load(); round++ {
				var more []store.Slot
				for i := range 2048 {
					page(b, 40, uint64(round*i+w))
					slot, _, err := s.Alloc(1, 1)
					if err != nil {
						panic(err)
					}
					s.Write(&store.Op{Slot: slot, Data: b, Done: func(*store.Op) { done <- struct{}{} }})
					<-done
					more = append(more, slot)
				}
				rand.Shuffle(len(more), func(i, j int) { more[i], more[j] = more[j], more[i] })
				for _, slot := range more {
					s.Free(slot, 1)
				}
			}
		})
	}
	time.Sleep(1500 * time.Millisecond)
	stop.Store(true)
	wg.Wait()
	if msg := failed.Load(); msg != nil {
		t.Error(*msg)
	}
	verify(t, s)
	if s.Stats().Moved < 1000 {
		t.Errorf("only %d pieces were moved", s.Stats().Moved)
	}
	t.Logf("%d moved", s.Stats().Moved)
}

func BenchmarkStore(b *testing.B) {
	storetest.Benchmark(b, func(b testing.TB) store.Store {
		s, err := New(nil)
		if err != nil {
			b.Fatal(err)
		}
		return s
	})
}
