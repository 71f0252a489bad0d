package files

import (
	"context"
	"strings"
	"testing"
	"time"

	"machpager/pager/store"
	"machpager/pager/store/file"
)

// Check finds nothing in a store that is in use, of which a file is being removed, and each thing that is broken for it.
func TestCheck(t *testing.T) {
	words := anonymous(t)
	s, err := New(&Options{Words: words, Files: []File{{Options: file.Options{Dir: t.TempDir()}}, {Options: file.Options{Dir: t.TempDir()}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	check := func() (list []string, compared bool) {
		t.Helper()
		compared, err := s.Check(context.Background(), func(what string) { list = append(list, what) })
		if err != nil {
			t.Fatal(err)
		}
		return list, compared
	}
	write := func(slot store.Slot, n int) {
		t.Helper()
		done := make(chan error, 1)
		s.Write(&store.Op{Slot: slot, Data: make([]byte, n*store.SlotSize), Done: func(op *store.Op) { done <- op.Err }})
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	first, n, err := s.Alloc(64, 1)
	if err != nil || n != 64 {
		t.Fatal(n, err)
	}
	write(first, 32) // to one file
	write(first+32, 32)
	if list, compared := check(); len(list) > 0 || !compared {
		t.Errorf("at rest: %q, %v", list, compared)
	}

	removed := make(chan error, 1)
	go func() { removed <- s.Delete(context.Background(), 2) }()
	stop := time.Now().Add(100 * time.Millisecond)
	for running := true; running || time.Now().Before(stop); {
		select {
		case err := <-removed:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
		}
		slot, n, err := s.Alloc(8, 1)
		if err != nil {
			t.Fatal(err)
		}
		write(slot, n)
		if list, _ := check(); len(list) > 0 {
			t.Fatalf("in use: %q", list)
		}
		s.Free(slot, n)
	}

	w := words.Words()[first-1:]
	for _, c := range []struct {
		name   string
		break_ func()
		want   string
	}{
		{"two slots in one place", func() { w[5].Store(w[4].Load()) }, "are in one place, slot "},
		{"a place that no slot is in", func() { w[5].Store(0) }, "part 1 has 1 slots in use that no slot of the store is in"},
		{"a part that is not there", func() { w[5].Store(1<<8 | 9) }, "slot 6 is in part 9, which is not there"},
	} {
		was := w[5].Load()
		c.break_()
		list, _ := check()
		w[5].Store(was)
		if len(list) == 0 || !strings.Contains(list[0], c.want) {
			t.Errorf("%s: %q, want %q", c.name, list, c.want)
		}
	}
	if list, compared := check(); len(list) > 0 || !compared {
		t.Errorf("at the end: %q, %v", list, compared)
	}
}
