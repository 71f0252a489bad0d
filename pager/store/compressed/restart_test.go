package compressed

import (
	"errors"
	"testing"
	"time"

	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

func TestKilled(t *testing.T) {
	killed(t, 0, "compressed.moving", "compressed.moved", "compressed.discard", "compressed.discarded")
}

// Few slabs: they are emptied one into the other, and none is given back.
func TestKilledAtLimit(t *testing.T) { killed(t, 512<<10) }

func killed(t *testing.T, limit int64, failpoints ...string) {
	const capacity = 1024
	storetest.Restart{
		Memories: []string{"index", "data"},
		Open: func(l *storetest.Lasting) (store.Store, error) {
			index, err1 := l.Memory("index")
			data, err2 := l.Memory("data")
			if err := errors.Join(err1, err2); err != nil {
				return nil, err
			}
			return New(&Options{Index: index, Data: data, Capacity: capacity * store.SlotSize, Limit: limit, Slack: -1})
		},
		// Every other of some slots is freed: what is left moves together.
		Churn: func(_ *storetest.Lasting, s store.Store) error {
			var slots [128]store.Slot
			b := make([]byte, store.SlotSize)
			for i := range slots {
				slot, _, err := s.Alloc(1, 1)
				if err != nil {
					return err
				}
				storetest.FillKind(b, storetest.Text, uint64(slot))
				s.Write(&store.Op{Slot: slot, Data: b, Done: func(*store.Op) {}}) // in memory: at once; it may be full
				slots[i] = slot
			}
			for k := range 2 {
				for i := k; i < len(slots); i += 2 {
					s.Free(slots[i], 1)
				}
			}
			time.Sleep(100 * time.Microsecond)
			return nil
		},
		Check: func(t testing.TB, s store.Store, used int64) {
			verify(t, s.(*Store))
			if st := s.(*Store).Stats(); used == 0 && st.Memory != 0 || st.Zeros+st.Packed+st.Raw != used {
				t.Errorf("%d slots used: %+v", used, st)
			}
		},
		Capacity:   capacity,
		Failpoints: append(failpoints, "compressed.grown", "compressed.copied", "compressed.summed", "compressed.committed"),
	}.Run(t)
}
