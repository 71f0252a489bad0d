package tiered

import (
	"errors"
	"testing"

	"machpager/pager/store"
	"machpager/pager/store/compressed"
	"machpager/pager/store/file"
	"machpager/pager/store/storetest"
)

func TestKilled(t *testing.T) {
	const capacity = 512
	storetest.Restart{
		Memories: []string{"words", "index", "data", "sums"},
		Files:    []string{"paging"},
		Open: func(l *storetest.Lasting) (store.Store, error) {
			words, err1 := l.Memory("words")
			index, err2 := l.Memory("index")
			data, err3 := l.Memory("data")
			sums, err4 := l.Memory("sums")
			f, err5 := l.File("paging")
			if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
				return nil, err
			}
			fast, err1 := compressed.New(&compressed.Options{Index: index, Data: data, Limit: 256 << 10})
			slow, err2 := file.New(&file.Options{File: f, Sums: sums})
			if err := errors.Join(err1, err2); err != nil {
				return nil, err
			}
			return New(Options{Fast: fast, Slow: slow, Words: words, Capacity: capacity * store.SlotSize, Promote: true, Reserve: 128 << 10})
		},
		Check: func(t testing.TB, st store.Store, used int64) {
			s := st.(*Store)
			eventually(t, "the tiers have what the words say", func() bool { // the mover has two copies of what it moves
				n := s.Stats()
				return n.Fast+n.Slow == used && s.fast.Store.Info().Used == n.Fast*store.SlotSize && s.slow.Store.Info().Used == n.Slow*store.SlotSize
			})
		},
		Capacity: capacity,
		Failpoints: []string{"indirect.stored", "indirect.word", "indirect.committed", "indirect.cleared", "indirect.freed", "indirect.marked", "indirect.copied", "indirect.swapped",
			"indirect.drained", "indirect.vacated", "compressed.committed", "file.written"},
	}.Run(t)
}
