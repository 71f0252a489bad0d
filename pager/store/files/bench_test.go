package files

import (
	"testing"

	"machpager/pager/store"
	"machpager/pager/store/file"
	"machpager/pager/store/storetest"
)

// BenchmarkRead compares a store of one paging file with that file alone: what the words between slot and place cost.
func BenchmarkRead(b *testing.B) {
	const slots = 8192
	for _, c := range []struct {
		name string
		open func() (store.Store, error)
	}{
		{"file", func() (store.Store, error) { return file.New(&file.Options{Dir: b.TempDir()}) }},
		{"files", func() (store.Store, error) {
			return New(&Options{Files: []File{{Options: file.Options{Dir: b.TempDir()}}}})
		}},
	} {
		s, err := c.open()
		if err != nil {
			b.Fatal(err)
		}
		done := make(chan struct{}, 1)
		op := &store.Op{Done: func(*store.Op) { done <- struct{}{} }}
		do := func(b *testing.B, call func(*store.Op), slot store.Slot, data []byte) {
			op.Slot, op.Data = slot, data
			call(op)
			<-done
			if op.Err != nil {
				b.Fatal(op.Err)
			}
		}
		buf := make([]byte, 512*store.SlotSize)
		storetest.Fill(buf, 1)
		var first []store.Slot
		for range slots / 512 {
			slot, n, err := s.Alloc(512, 512)
			if err != nil || n != 512 {
				b.Fatal(n, err)
			}
			first = append(first, slot)
			do(b, s.Write, slot, buf)
		}
		b.Run(c.name+"/1", func(b *testing.B) {
			b.SetBytes(store.SlotSize)
			for i := range b.N {
				do(b, s.Read, first[i%len(first)]+store.Slot(i*61%512), buf[:store.SlotSize])
			}
		})
		b.Run(c.name+"/512", func(b *testing.B) {
			b.SetBytes(int64(len(buf)))
			for i := range b.N {
				do(b, s.Read, first[i%len(first)], buf)
			}
		})
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
