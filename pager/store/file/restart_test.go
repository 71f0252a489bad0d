package file

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

func TestKilled(t *testing.T) {
	const capacity = 4096 // so that there is something to be given back
	storetest.Restart{
		Memories: []string{"sums"},
		Files:    []string{"paging"},
		Open: func(l *storetest.Lasting) (store.Store, error) {
			sums, err := l.Memory("sums")
			if err != nil {
				return nil, err
			}
			f, err := l.File("paging")
			if err != nil {
				return nil, err
			}
			return New(&Options{File: f, Sums: sums, Capacity: capacity * store.SlotSize, Slack: -1})
		},
		// What nobody uses goes back to the file system.
		Check: func(t testing.TB, s store.Store, used int64) {
			var st unix.Stat_t
			for end := time.Now().Add(storetest.Deadline); ; time.Sleep(time.Millisecond) {
				if err := unix.Fstat(int(s.(*Store).File().Fd()), &st); err != nil {
					t.Fatal(err)
				}
				if st.Blocks*512 <= (used+8)*store.SlotSize {
					return
				}
				if time.Now().After(end) {
					t.Fatalf("%d slots are used, and the file has %d bytes on the file system", used, st.Blocks*512)
				}
			}
		},
		Capacity:   capacity,
		Failpoints: []string{"file.grown", "file.write", "file.summed", "file.written", "file.punch", "file.punched"},
	}.Run(t)
}
