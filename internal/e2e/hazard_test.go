package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strconv"
	"sync"
	"testing"
	"time"

	"machpager/internal/daemon"
	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["hazard"] = using(hazard)
	tasks["pager"] = told(servePager)
}

// pagerAt starts a pager that listens at a socket in a directory of the test's, and is there until the test has ended.
func pagerAt(t testing.TB, o pagerOptions) (socket string, k *task) {
	t.Helper()
	if o.Socket == "" {
		o.Socket = filepath.Join(t.TempDir(), "pager.sock")
	}
	k = startFor(t, "pager", 10*time.Minute, nil)
	k.send(o)
	k.ready()
	return o.Socket, k
}

type pagerOptions struct {
	Socket   string
	Resident int64
	Memory   bool // paging space in memory, not in a file

	Store, Policy, Dir   string
	Compressed, Capacity int64

	Restarts   int
	NoStandby  bool
	Served     bool // by spawn.Serve: until SIGTERM
	Settled    time.Duration
	Failpoints string
}

// servePager is a process whose child is the pager; it waits for the end of its input.
func servePager(c *conn, o pagerOptions) error {
	if o.Resident == 0 {
		o.Resident = 64 << 20
	}
	if o.Memory {
		o.Store = "memory"
	}
	if o.Served {
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		return spawn.Serve(c.untilTold(), spawn.ServeOptions{Log: log, Grace: time.Second, Ready: func(int) { c.send(true) }, Config: daemon.Config{
			Resident: o.Resident, Socket: o.Socket, Store: o.Store, Policy: o.Policy, Dir: o.Dir, Compressed: o.Compressed, Capacity: o.Capacity, Restarts: o.Restarts,
			NoStandby: o.NoStandby, Settled: o.Settled, Failpoints: o.Failpoints}})
	}
	p, err := startPager(context.Background(), spawn.Options{Restarts: o.Restarts, Resident: o.Resident, Socket: o.Socket, Store: o.Store, Policy: o.Policy, Dir: o.Dir,
		Compressed: o.Compressed, Capacity: o.Capacity})
	if err != nil {
		return err
	}
	defer p.Close()
	if err := c.send(true); err != nil {
		return err
	}
	io.Copy(io.Discard, os.Stdin)
	return p.Close()
}

// TestHazard is the reason why the pager is another process: goroutines that stop in faults inside assembly (copy, bytes.Equal, clear)
// keep their Ps and cannot be preempted, while collections and profiles stop the world all the time.
func TestHazard(t *testing.T) {
	socket, _ := pagerAt(t, pagerOptions{})
	for _, how := range []struct{ name, socket string }{{"spawned", ""}, {"socket", socket}} {
		for _, procs := range []int{1, 2, 4} {
			t.Run(fmt.Sprintf("%s/GOMAXPROCS=%d", how.name, procs), func(t *testing.T) {
				run(t, "hazard", hazardArg{At{how.socket}, soak(2 * time.Second)}, nil, func(c *exec.Cmd) {
					c.Env = append(os.Environ(), "GOMAXPROCS="+strconv.Itoa(procs))
				})
			})
		}
	}
}

type hazardArg struct {
	At
	For time.Duration
}

func hazard(ctx context.Context, c *conn, p *region.Pager, arg hazardArg) error {
	const each = 256 << 10
	n := 4 * runtime.GOMAXPROCS(0)
	r, err := p.Allocate(ctx, int64(n*each), nil)
	if err != nil {
		return err
	}

	stop := make(chan struct{})
	var nuisance sync.WaitGroup
	pester := func(f func()) {
		nuisance.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					f()
				}
			}
		})
	}
	pester(runtime.GC)
	pester(func() { pprof.Lookup("goroutine").WriteTo(io.Discard, 1) })

	errs := make(chan error, n)
	end := time.Now().Add(arg.For)
	for g := range n {
		go func() {
			errs <- func() error {
				off := int64(g * each)
				mine := r.Bytes()[off : off+each]
				want, zero := make([]byte, each), make([]byte, each)
				for v := uint64(1); v == 1 || time.Now().Before(end); v++ {
					fill(want, off, v)
					copy(mine, want) // zero-filled or stored, to be written
					if err := r.PageOut(ctx, off, each); err != nil {
						return err
					}
					if !bytes.Equal(mine, want) { // stored, to be read
						return fmt.Errorf("goroutine %d, version %d: wrong at %d", g, v, firstDiff(mine, want))
					}
					if err := r.PageOut(ctx, off, each); err != nil {
						return err
					}
					clear(mine[:each/2])
					if !bytes.Equal(mine[:each/2], zero[:each/2]) || !bytes.Equal(mine[each/2:], want[each/2:]) {
						return fmt.Errorf("goroutine %d, version %d: wrong after clear", g, v)
					}
				}
				return nil
			}()
		}()
	}
	for range n {
		err = firstOf(err, <-errs)
	}
	close(stop)
	nuisance.Wait()
	return err
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// firstDiff is the first index where a and b differ, -1 if nowhere.
func firstDiff(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// soak is d, or what MACHPAGER_SOAK says (make soak).
func soak(d time.Duration) time.Duration {
	if s, err := time.ParseDuration(os.Getenv("MACHPAGER_SOAK")); err == nil {
		return s
	}
	return d
}
