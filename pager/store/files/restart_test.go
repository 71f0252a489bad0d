package files

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"machpager/pager/store"
	"machpager/pager/store/file"
	"machpager/pager/store/storetest"
)

// lasting is the paging file of a number, with its checksums. What keeps it has it already.
func lasting(l *storetest.Lasting, id ID) (File, error) {
	f, err := l.File(fmt.Sprintf("file %d", id))
	return File{ID: id, Priority: int(id), Options: file.Options{File: f, Slack: -1}, Sums: func(id ID) (store.Memory, error) {
		return l.Memory(fmt.Sprintf("sums %d", id))
	}, Keep: func(ID, *os.File) error { return nil }}, err
}

// The file of the higher priority is removed and added again all the time: its contents move.
func TestKilled(t *testing.T) {
	const capacity = 512
	storetest.Restart{
		Memories: []string{"words", "sums 1", "sums 2"},
		Files:    []string{"file 1", "file 2"},
		Open: func(l *storetest.Lasting) (store.Store, error) {
			words, err := l.Memory("words")
			if err != nil {
				return nil, err
			}
			one, err1 := lasting(l, 1)
			two, err2 := lasting(l, 2)
			if err := errors.Join(err1, err2); err != nil {
				return nil, err
			}
			return New(&Options{Words: words, Capacity: capacity * store.SlotSize, Files: []File{one, two}})
		},
		Churn: func(l *storetest.Lasting, st store.Store) error {
			s := st.(*Store)
			if err := s.Delete(context.Background(), 2); err != nil {
				return err
			}
			two, err := lasting(l, 2)
			if err == nil {
				_, err = s.Create(two)
			}
			time.Sleep(time.Millisecond) // something comes in
			return err
		},
		Check: func(t testing.TB, st store.Store, total int64) {
			n := used(st.(*Store))
			if n[1]+n[2] != total || len(n) != 2 {
				t.Errorf("%d slots used, in the files: %v", total, n)
			}
		},
		Capacity: capacity,
		Failpoints: []string{"indirect.stored", "indirect.word", "indirect.committed", "indirect.cleared", "indirect.freed", "indirect.marked", "indirect.copied", "indirect.swapped",
			"indirect.drained", "indirect.vacated", "files.keep", "files.kept", "files.removed", "file.written"},
	}.Run(t)
}
