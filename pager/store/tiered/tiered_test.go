package tiered

import (
	"testing"

	"machpager/pager/store"
	"machpager/pager/store/compressed"
	"machpager/pager/store/file"
	"machpager/pager/store/memory"
	"machpager/pager/store/storetest"
)

type tiers struct {
	s          *Store
	fast, slow *storetest.Faulty
	words      store.Memory
	file       *file.Store
	data       store.Memory // of the fast tier
}

var made = map[*Store]*tiers{}

func anonymous(t testing.TB) store.Memory {
	t.Helper()
	m, err := store.NewAnonymous(8 << 30)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// open makes a compressed tier of limit bytes before a file.
func open(t testing.TB, o Options, limit int64) *tiers {
	t.Helper()
	data := anonymous(t)
	fast, err := compressed.New(&compressed.Options{Limit: limit, Data: data})
	if err != nil {
		t.Fatal(err)
	}
	return openBefore(t, o, fast, data)
}

// openPlain makes an uncompressed tier of limit bytes before a file, so that flip finds its contents.
func openPlain(t testing.TB, o Options, limit int64) *tiers {
	t.Helper()
	data := anonymous(t)
	fast, err := memory.New(data, &memory.Options{Capacity: limit})
	if err != nil {
		t.Fatal(err)
	}
	return openBefore(t, o, fast, data)
}

func openBefore(t testing.TB, o Options, fast store.Store, data store.Memory) *tiers {
	t.Helper()
	x := &tiers{words: anonymous(t), data: data}
	var err error
	if x.file, err = file.New(&file.Options{Dir: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	x.fast, x.slow = storetest.NewFaulty(fast), storetest.NewFaulty(x.file)
	o.Fast, o.Slow, o.Words = x.fast, x.slow, x.words
	if x.s, err = New(o); err != nil {
		t.Fatal(err)
	}
	made[x.s] = x
	t.Cleanup(func() {
		x.s.Close()
		delete(made, x.s)
	})
	return x
}

// flip changes a bit wherever the slot is. Everything is still: nothing moves.
func flip(t testing.TB, s store.Store, slot store.Slot) {
	x := made[s.(*Store)]
	w := x.words.Words()[slot-1].Load()
	at := int64(w >> 8 & (1<<41 - 1))
	switch w & 0xff {
	case slowPart:
		storetest.Flip(t, x.file.File(), (at-1)*store.SlotSize+99)
	case fastPart: // memory store's layout
		i := at - 1
		x.data.Bytes()[i/store.GroupSlots*(store.GroupSlots*(store.SlotSize+4))+store.GroupSlots*4+i%store.GroupSlots*store.SlotSize+99] ^= 4
	default:
		t.Fatalf("slot %d is nowhere", slot)
	}
}

func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name    string
		limit   int64
		promote bool
	}{{"all fits the fast tier", 256 << 20, false}, {"half fits", 1 << 20, false}, {"half fits, promoted", 1 << 20, true}, {"little fits, promoted", 128 << 10, true}} {
		t.Run(c.name, func(t *testing.T) {
			storetest.Run(t, storetest.Harness{
				New: func(t testing.TB, capacity int64) store.Store {
					return openPlain(t, Options{Capacity: capacity, Promote: c.promote}, c.limit).s
				},
				Corrupt: flip,
			})
		})
	}
}
