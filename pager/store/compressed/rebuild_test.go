package compressed

import (
	"errors"
	"math/rand/v2"
	"testing"

	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

// One store after the other takes over what the last one left at any moment.
func TestRestart(t *testing.T) {
	index, data := anonymous(t), anonymous(t)
	s := open(t, Options{Index: index, Data: data, Slack: -1})
	l := storetest.NewLife(s, 3)
	for range 30 {
		l.Step(40)
		if _, _, err := s.Alloc(20, 1); err != nil { // lost with its store
			t.Fatal(err)
		}
		put(t, s, 33) // written, but in no map
		next, err := New(&Options{Index: index, Data: data, Slack: -1})
		if err != nil {
			t.Fatal(err)
		}
		if err := next.Rebuild(l.Used); err != nil {
			t.Fatal(err)
		}
		verify(t, next)
		l.On(next)
		if err := l.Verify(); err != nil {
			t.Fatal(err)
		}
		s = next
	}
	l.Drop()
	if st := s.Stats(); st.Memory != 0 || st.Bytes != 0 {
		t.Errorf("emptied: %+v", st)
	}
}

func put(t testing.TB, s store.Store, percent int) store.Slot {
	t.Helper()
	slot, _, err := s.Alloc(1, 1)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, store.SlotSize)
	page(b, percent, uint64(slot))
	write(t, s, slot, b)
	return slot
}

// Words of the index that make no sense harm the slots they are of, and no others. Nothing panics.
func TestBadIndex(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 9))
	for range 40 {
		index, data := anonymous(t), anonymous(t)
		s := open(t, Options{Index: index, Data: data})
		var slots []store.Slot
		for range 200 {
			slots = append(slots, put(t, s, rng.IntN(101)))
		}
		bad := map[store.Slot]bool{}
		for range 20 {
			slot := slots[rng.IntN(len(slots))]
			w := rng.Uint64() >> rng.IntN(64)
			if rng.IntN(2) == 0 { // somebody else's
				w = s.index.entry(slots[rng.IntN(len(slots))])[0].Load()
				for other := range s.index.entries {
					if uint64(other.w) == w {
						bad[other.slot] = true // which of the two keeps it is not known
					}
				}
			}
			bad[slot] = true
			s.index.entry(slot)[0].Store(w)
		}
		next, err := New(&Options{Index: index, Data: data})
		if err != nil {
			t.Fatal(err)
		}
		err = next.Rebuild(func(yield func(store.Slot, int) bool) {
			for _, slot := range slots {
				if !yield(slot, 1) {
					return
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		verify(t, next)
		got := make([]byte, store.SlotSize)
		for _, slot := range slots {
			_, err := storetest.Do(t, next.Read, slot, got)
			switch {
			case bad[slot]:
				if err != nil && !errors.Is(err, store.ErrCorrupt) {
					t.Errorf("slot %d: %v", slot, err)
				}
			case err != nil:
				t.Errorf("slot %d, whose word is right: %v", slot, err)
			}
			next.Free(slot, 1)
		}
		verify(t, next)
	}
}

type named struct {
	slot store.Slot
	w    where
}

// entries is each, as an iterator.
func (x *index) entries(yield func(named) bool) {
	more := true
	x.each(func(i int, w where) { more = more && yield(named{store.Slot(i + 1), w}) })
}

// A store with a lower limit than that of before loses nothing.
func TestRestartWithLowerLimit(t *testing.T) {
	index, data := anonymous(t), anonymous(t)
	l := storetest.NewLife(open(t, Options{Index: index, Data: data, Limit: 8 << 20}), 4)
	l.Step(200)
	next, err := New(&Options{Index: index, Data: data, Limit: slabSize})
	if err != nil {
		t.Fatal(err)
	}
	if err := next.Rebuild(l.Used); err != nil {
		t.Fatal(err)
	}
	l.On(next)
	if err := l.Verify(); err != nil {
		t.Fatal(err)
	}
	if i := next.Info(); i.Free != 0 || i.Total != i.Used {
		t.Errorf("info beyond the limit: %+v", i)
	}
	l.Step(100)
	if err := l.Verify(); err != nil {
		t.Fatal(err)
	}
	l.Drop()
}
