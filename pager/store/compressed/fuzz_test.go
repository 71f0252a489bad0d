package compressed

import (
	"encoding/binary"
	"testing"

	"machpager/pager/store"
)

// FuzzRebuild takes over an index and slabs that make no sense: what was stored reads back as itself or as an error, and the store goes on.
func FuzzRebuild(f *testing.F) {
	f.Add([]byte{}, []byte{}, uint64(0))
	f.Add(make([]byte, 64), []byte("data"), uint64(3))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0x80, 2, 2, 2, 2, 2, 2, 2, 2}, make([]byte, 100), ^uint64(0))
	f.Fuzz(func(t *testing.T, index, data []byte, used uint64) {
		if len(index) > store.SlotSize || len(data) > slabSize {
			return
		}
		im, dm := anonymous(t), anonymous(t)
		if err := im.Grow(store.SlotSize); err != nil {
			t.Fatal(err)
		}
		for i := 0; i+8 <= len(index); i += 8 {
			im.Words()[i/8].Store(binary.LittleEndian.Uint64(index[i:]))
		}
		if err := dm.Grow(slabSize); err != nil {
			t.Fatal(err)
		}
		copy(dm.Bytes(), data)
		s, err := New(&Options{Index: im, Data: dm, Slack: -1})
		if err != nil {
			return
		}
		defer s.Close()
		var slots []store.Slot
		for i := range 64 {
			if used>>i&1 != 0 && i < store.SlotSize/entrySize {
				slots = append(slots, store.Slot(i+1))
			}
		}
		if err := s.Rebuild(func(yield func(store.Slot, int) bool) {
			for _, slot := range slots {
				if !yield(slot, 1) {
					return
				}
			}
		}); err != nil {
			return
		}
		buf := make([]byte, store.SlotSize)
		do := func(f func(*store.Op), slot store.Slot) error {
			done := make(chan error, 1)
			f(&store.Op{Slot: slot, Data: buf, Done: func(op *store.Op) { done <- op.Err }})
			return <-done
		}
		for _, slot := range slots {
			do(s.Read, slot) // an error, or something: it must come back
			for i := range buf {
				buf[i] = byte(slot) ^ byte(i>>4)
			}
			if err := do(s.Write, slot); err != nil {
				t.Fatalf("write slot %d: %v", slot, err)
			}
			clear(buf)
			if err := do(s.Read, slot); err != nil || buf[100] != byte(slot)^byte(100>>4) {
				t.Fatalf("slot %d: %d, %v", slot, buf[100], err)
			}
		}
	})
}
