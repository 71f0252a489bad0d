package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/pager/emm"
	"machpager/region"
)

// ofStore reports whether an error is what a store that fails makes of an operation: memory that cannot be read, contents that cannot be stored, frames that cannot be had.
func ofStore(err error) bool {
	for _, e := range []error{emm.MemoryError, emm.NoSpace, emm.ResourceShortage, unix.EIO, unix.ENOSPC} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// despite does an operation again for as long as a store fails, and tells how often it did. It gives up, with the error, when that takes longer than anybody may stand still.
func despite(once func() error) (again int, err error) {
	for end := time.Now().Add(hangLimit); ; again++ {
		if err = region.Guard(once); err == nil || !ofStore(err) || time.Now().After(end) {
			return again, err
		}
		time.Sleep(time.Millisecond)
	}
}

// tide fills a file system to the last block, gives it back bit by bit, and begins again, until stop is closed. It tells how often it was found full.
func tide(t *testing.T, dir string, bit int64, rng *rand.Rand, stop <-chan struct{}) (full int) {
	f, err := os.OpenFile(filepath.Join(dir, "filler"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer func() {
		if err := firstOf(f.Truncate(0), f.Close(), os.Remove(f.Name())); err != nil {
			t.Error(err)
		}
	}()
	left := func() int64 {
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
			t.Error(err)
		}
		return int64(st.Bavail) * st.Bsize
	}
	for size := int64(0); ; {
		if size == 0 {
			for n := left(); n > 0; n = left() { // others take blocks meanwhile, and then fallocate takes none
				if unix.Fallocate(int(f.Fd()), 0, size, n) == nil {
					size += n
				}
			}
		}
		if left() == 0 {
			full++
		}
		select {
		case <-stop:
			return full
		case <-time.After(time.Duration(rng.Int64N(int64(300 * time.Millisecond)))):
		}
		size = max(0, size-bit) &^ 4095
		if err := f.Truncate(size); err != nil {
			t.Error(err)
			return full
		}
	}
}

// TestKilledWhileStoreFails is TestKilled on a store that fails: the paging file lies on a file system that is full and gets a little room now and then, and some of its reads and writes end
// with EIO, or ENOSPC. A task meets errors then, and does again what it was about: never a wrong byte, never zeros in place of data, and nobody stands still for 5 s.
func TestKilledWhileStoreFails(t *testing.T) {
	seed := randomSeed(t)
	kills, full := 0, 0
	until := time.Now().Add(soak(0))
	for i := uint64(0); i == 0 || time.Now().Before(until); i++ {
		rng := rand.New(rand.NewPCG(seed, i))
		for n, store := range []string{daemon.StoreFile, daemon.StoreTiered} {
			s := smallShape(rng, store)
			s.failing = true
			if store == daemon.StoreTiered { // more than fits into compressed memory
				s.pageSize, s.pages, s.budget = 64<<10, 64+rng.IntN(32), 8+rng.IntN(8)
			}
			t.Run(s.String(), func(t *testing.T) {
				// Each page that changes is stored beside what it was, and a snapshot has another.
				need := 4*int64(s.pages*s.pageSize) + 1<<20
				disk, err := smallDisk(need)
				if err != nil {
					t.Fatal(err)
				}
				defer disk.Close()
				o := s.options()
				o.Dir = disk.Name()
				o.Failpoints = fmt.Sprintf("file.pwrite=%d:%s,file.pread=%d:eio", 5+rng.IntN(20), []string{"eio", "enospc"}[rng.IntN(2)], 100+rng.IntN(200))
				turns, water := rand.New(rand.NewPCG(seed, i<<8+uint64(n))), rand.New(rand.NewPCG(seed, i<<8+uint64(n)+128))
				stop, over := make(chan struct{}), make(chan int)
				go func() { over <- tide(t, disk.Name(), need/8, water, stop) }()
				v := runRestless(t, rng, s, o, max(3*time.Second, soak(0)/16), func(v *restless) {
					defer func() { close(stop); full += <-over }()
					v.disturb(turns, disturbances[[]string{"kill", "stop"}[turns.IntN(8)/7]])
				})
				// The other store has compressed memory before the file, and may get by.
				if said := v.guard.output(); store == daemon.StoreFile && !strings.Contains(said, "pages cannot be stored") && !strings.Contains(said, "read page from paging space") {
					t.Error("the store did not fail")
				}
				if kills += v.kills; v.kills+v.stops == 0 {
					t.Error("nothing happened to the pager")
				}
			})
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d kills survived in all, while the file system was full %d times", kills, full)
}
