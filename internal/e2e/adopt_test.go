package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["survivor"] = told(survivor)
	tasks["sharer"] = using(sharer)
}

// restarts is how many deaths a pager of these tests may die: more than they kill.
const restarts = 10000

// pagerPID is the process that answers now.
func pagerPID(ctx context.Context, p *region.Pager) (int, error) {
	i, err := p.Info(ctx)
	return i.PagerPID, err
}

// killPager kills the pager and returns the one that took its place.
func killPager(ctx context.Context, p *region.Pager) (int, error) {
	pid, err := pagerPID(ctx, p)
	if err != nil {
		return 0, err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return 0, err
	}
	for {
		now, err := pagerPID(ctx, p)
		if err != nil || now != pid {
			return now, err
		}
		time.Sleep(time.Millisecond) // the dying one may have answered
	}
}

// check compares memory with what fill makes.
func check(b []byte, off int64, v uint64) error {
	want := make([]byte, len(b))
	fill(want, off, v)
	if at := firstDiff(b, want); at >= 0 {
		return fmt.Errorf("byte %#x is %#x, want %#x of version %d", off+int64(at), b[at], want[at], v)
	}
	return nil
}

type sharerArg struct {
	At
	Port emm.Port
	Size int64
}

// sharer maps an object, and reads and writes its second half whenever it is told a version: it finds what it wrote last, and the first half of version
// v-1 by the other task.
func sharer(ctx context.Context, c *conn, p *region.Pager, arg sharerArg) error {
	o, r, err := share(ctx, p, arg.Port, arg.Size, nil)
	if err != nil {
		return err
	}
	half := arg.Size / 2
	for {
		var v uint64
		if err := c.recv(&v); err != nil {
			return err
		}
		if v == 0 {
			return firstOf(r.Close(), o.Close())
		}
		err := check(r.Bytes()[:half], 0, v-1)
		if err == nil && v > 1 {
			err = check(r.Bytes()[half:], half, v-1)
		}
		fill(r.Bytes()[half:], half, v)
		msg := ""
		if err != nil {
			msg = err.Error()
		}
		if err := c.send(msg); err != nil {
			return err
		}
	}
}

type survivorArg struct {
	Store, Dir string
	Kills      int
}

// survivor has a pager of its own, which it shares with a sharer, and kills it again and again: everything there is goes on.
func survivor(c *conn, arg survivorArg) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	const page, size, budget = 4096, 8 << 20, 2 << 20
	p, err := startPager(ctx, spawn.Options{Resident: budget, Store: arg.Store, Dir: arg.Dir, Socket: filepath.Join(arg.Dir, "pager.sock"), Restarts: restarts})
	if err != nil {
		return err
	}
	// What is shared, four times the budget.
	shared, mem, err := create(ctx, p, size, nil, nil)
	if err != nil {
		return err
	}
	ro, err := shared.Map(ctx, &region.MapOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	fill(mem.Bytes()[:size/2], 0, 0)
	if err := c.send(sharerArg{At{filepath.Join(arg.Dir, "pager.sock")}, shared.Port(), size}); err != nil {
		return err
	}
	if err := c.await(); err != nil {
		return err
	}
	// An object over a file.
	name := filepath.Join(arg.Dir, "data")
	contents := make([]byte, 1<<20)
	fill(contents, 0, 7)
	if err := os.WriteFile(name, contents, 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	fo, fm, err := mapFile(ctx, p, f, region.ObjectOptions{}, nil)
	if err != nil {
		return err
	}
	f.Close()
	// Memory of its own, wired in part, and of the sizes that the pager treats apart.
	own, err := p.Allocate(ctx, 64*page, nil)
	if err != nil {
		return err
	}
	fill(own.Bytes(), 0, 1)
	if err := own.Wire(ctx, 8*page, 16*page); err != nil {
		return err
	}
	huge, err := p.Allocate(ctx, 4<<20, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{PageSize: 64 << 10}})
	if err != nil {
		return err
	}
	fill(huge.Bytes(), 0, 2)
	shrunk, sm, err := create(ctx, p, 64*page, nil, nil)
	if err != nil {
		return err
	}
	fill(sm.Bytes(), 0, 3)
	if err := shrunk.SetSize(ctx, 16*page); err != nil {
		return err
	}
	snap, err := shared.Snapshot(ctx)
	if err != nil {
		return err
	}
	before, err := p.Objects(ctx)
	if err != nil {
		return err
	}

	for v := uint64(1); v <= uint64(arg.Kills); v++ {
		// Calls under way end once, as if nothing had happened.
		var wg sync.WaitGroup
		var failed atomic.Pointer[error]
		stop := make(chan struct{})
		work := func(what string, fn func(i int) error) {
			wg.Go(func() {
				for i := 0; ; i++ {
					if err := fn(i); err != nil {
						err = fmt.Errorf("%s: %w", what, err)
						failed.CompareAndSwap(nil, &err)
						return
					}
					select {
					case <-stop:
						return
					default:
					}
				}
			})
		}
		work("populate", func(i int) error { return mem.Populate(ctx, int64(i%8)<<20, 256<<10, false) })
		work("page out", func(i int) error { return mem.PageOut(ctx, int64(i%8)<<20, 1<<20) })
		work("wire", func(i int) error { return firstOf(own.Wire(ctx, 32*page, 8*page), own.Unwire(ctx, 32*page, 8*page)) })
		work("create and map", func(i int) error {
			o, r, err := create(ctx, p, 4*page, nil, nil)
			if err != nil {
				return err
			}
			fill(r.Bytes(), 0, v)
			err = check(r.Bytes(), 0, v)
			return firstOf(err, o.Close(), r.Close())
		})
		work("sync", func(i int) error { return fm.Sync(ctx, 0, 1<<20) })
		_, err := killPager(ctx, p)
		if err != nil {
			return fmt.Errorf("kill %d: %w", v, err)
		}
		// Faults that are there at once, without a call.
		err = firstOf(check(mem.Bytes()[:size/2], 0, v-1), check(own.Bytes(), 0, v), check(huge.Bytes(), 0, 2), check(ro.Bytes()[:size/2], 0, v-1))
		if err != nil {
			return fmt.Errorf("after kill %d: %w", v, err)
		}
		if err := check(sm.Bytes()[:16*page], 0, 3); err != nil {
			return fmt.Errorf("of a smaller size, after kill %d: %w", v, err)
		}
		close(stop)
		wg.Wait()
		if err := failed.Load(); err != nil {
			return fmt.Errorf("kill %d: %w", v, *err)
		}
		if err := c.send(v); err != nil {
			return err
		}
		var msg string
		if err := c.recv(&msg); err != nil {
			return err
		}
		if msg != "" {
			return fmt.Errorf("after kill %d the other task has: %s", v, msg)
		}
		fill(mem.Bytes()[:size/2], 0, v)
		fill(own.Bytes(), 0, v+1)
		fill(fm.Bytes()[:512<<10], 0, v)
	}
	// The file got what was written, the snapshot has what was there, the object grows with zeros.
	if err := fm.Sync(ctx, 0, 1<<20); err != nil {
		return err
	}
	got, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if err := firstOf(check(got[:512<<10], 0, uint64(arg.Kills)), check(got[512<<10:], 512<<10, 7)); err != nil {
		return fmt.Errorf("file: %w", err)
	}
	old, err := readObject(ctx, snap, 0, size/2)
	if err == nil {
		err = check(old, 0, 0)
	}
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if err := shrunk.SetSize(ctx, 64*page); err != nil {
		return err
	}
	if b := sm.Bytes()[16*page:]; !bytes.Equal(b, make([]byte, len(b))) {
		return errors.New("an object that grows again has what it had before it shrank")
	}
	// What is wired is resident, and can be unwired, once.
	if err := own.PageOut(ctx, 0, 64*page); err != nil {
		return err
	}
	if st := own.Stats(); st.Resident < 16*page {
		return fmt.Errorf("%d bytes of 16 wired pages are resident", st.Resident)
	}
	if err := own.Unwire(ctx, 8*page, 16*page); err != nil {
		return err
	}
	if err := own.Unwire(ctx, 8*page, 16*page); !errors.Is(err, emm.InvalidArgument) {
		return fmt.Errorf("unwired twice: %w", err)
	}
	after, err := p.Objects(ctx)
	if err != nil || len(after) != len(before) {
		return fmt.Errorf("%d objects, %d before, %v", len(after), len(before), err)
	}
	if err := c.send(uint64(0)); err != nil {
		return err
	}
	err = firstOf(fm.Close(), own.Close(), huge.Close(), sm.Close(), ro.Close(), mem.Close(), snap.Close(), shrunk.Close(), fo.Close(), shared.Close())
	if err != nil {
		return err
	}
	// The other task has gone, or is going, and slots are freed behind its back.
	var left []region.ObjectInfo
	var i region.Info
	for range 500 {
		left, err = p.Objects(ctx)
		if err == nil {
			i, err = p.Info(ctx)
		}
		if err != nil || len(left) == 0 && i.Resident == 0 && i.PagingFree == i.PagingTotal {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil || len(left) != 0 || i.Resident != 0 || i.PagingFree != i.PagingTotal {
		return fmt.Errorf("%d objects are left, %d bytes resident, %d of %d bytes of paging space free, %v", len(left), i.Resident, i.PagingFree, i.PagingTotal, err)
	}
	// The guardian holds what every pager has, and two connections.
	var many []string
	for what, n := range fdsOf(guardianOf(i.PagerPID)) {
		if strings.Contains(what, "machpager-table") || strings.Contains(what, "machpager-pager.map") || strings.HasPrefix(what, "/#") {
			many = append(many, fmt.Sprintf("%d %s", n, what))
		}
	}
	if len(many) > 0 {
		return fmt.Errorf("the guardian still holds %v", many)
	}
	if err := p.Close(); err != nil {
		return err
	}
	if n := len(descendants(os.Getpid())); n != 0 {
		return fmt.Errorf("%d children after Close", n)
	}
	return nil
}

// guardianOf is the parent of a pager.
func guardianOf(pager int) int { return parents()[pager] }

// TestSurvives: a pager that is killed again and again, and everything goes on.
func TestSurvives(t *testing.T) {
	for _, store := range []string{"file", "memory", "compressed", "tiered"} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			k := start(t, "survivor", nil)
			k.send(survivorArg{store, dir, 6})
			var arg sharerArg
			k.recv(&arg)
			other := start(t, "sharer", nil)
			other.send(arg)
			k.send(true)
			for {
				var v uint64
				k.recv(&v)
				other.send(v)
				if v == 0 {
					break
				}
				var msg string
				other.recv(&msg)
				k.send(msg)
			}
			other.wait()
			k.wait()
		})
	}
}
