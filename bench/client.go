//go:build linux

package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

// job is what the driver asks of the client, one line of JSON.
type job struct {
	System   string
	Workload workload
}

// result is the client's answer, one line of JSON.
type result struct {
	Times  []int64 // ns of each touch, if Single
	Total  int64   // ns of all touches
	Bytes  int64   // of the pages touched
	Faults int64   // that the kernel counted for the thread meanwhile
	None   string  // not "": the system has no such fault, and why
	Err    failure // it failed, if there is a text
}

// hello is the first line the driver sends.
type hello struct {
	Warm   int64                // bytes of memory to touch beforehand
	Floor  string               // the C floor's program; "": none
	Dir    string               // for the cached file
	Size   int                  // bytes of the largest target
	Pagers map[Placement]string // the sockets of the pagers, one for each placement; nil: none
}

// clientMain takes jobs from stdin and puts results to stdout.
func clientMain() error {
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0))) // one P may stand still in a fault: another one sees that the driver is gone
	debug.SetGCPercent(-1)                            // a collection would stop the world, and wait for the fault
	debug.SetMemoryLimit(1 << 30)
	lines := jobLines()
	var h hello
	if err := json.Unmarshal(<-lines, &h); err != nil {
		return err
	}
	c := client{allowed: new(unix.CPUSet)}
	if err := unix.SchedGetaffinity(0, c.allowed); err != nil {
		return fmt.Errorf("get affinity: %w", err)
	}
	var err error
	if c.systems, err = systems(h); err != nil {
		return err
	}
	if err := warmUp(h.Warm); err != nil {
		return err
	}
	runtime.LockOSThread()
	return serveJobs(lines, func(j job) result {
		r, err := c.run(j)
		if errors.Is(err, errNone) {
			r.None = err.Error()
		} else if err != nil {
			r.Err = failed(err)
		}
		return r
	})
}

type client struct {
	systems map[string]system
	allowed *unix.CPUSet
}

func (c *client) run(j job) (r result, err error) {
	s := c.systems[j.System]
	if s == nil {
		return r, fmt.Errorf("no system %q", j.System)
	}
	t, err := s.open(j.Workload)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	if j.Workload.Placement == SameCore {
		set := lastCPU(c.allowed)
		for _, pid := range append([]int{os.Getpid()}, t.handlers...) {
			if err := pin(pid, set); err != nil {
				return r, err
			}
		}
		defer pin(os.Getpid(), c.allowed) // handlers that are started later inherit it
	}
	return measure(t, j.Workload)
}

// measure touches every page of t once. What every system pays alike, the clock and the loop, is in the figures.
func measure(t *target, w workload) (result, error) {
	pages := order(w, len(t.mem)/pageSize, t.step())
	var (
		r      = result{Bytes: int64(len(pages)) * pageSize}
		mem    = words(t.mem)
		sum    uint64
		before unix.Rusage
		after  unix.Rusage
		writes = w.Op.writes()
		epoch  = time.Now()
	)
	if w.Single {
		r.Times = make([]int64, len(pages))
		for i := range r.Times {
			r.Times[i] = 1 // the sample's own first touch is not to be measured
		}
	}
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
		return r, fmt.Errorf("getrusage: %w", err)
	}
	begin := time.Since(epoch)
	switch {
	case t.fetch != nil && w.Single:
		for i, p := range pages {
			at := time.Since(epoch)
			t.fetch(p)
			sum += mem[p*wordsPage]
			r.Times[i] = int64(time.Since(epoch) - at)
		}
	case t.fetch != nil:
		for _, p := range pages {
			t.fetch(p)
			sum += mem[p*wordsPage]
		}
	case writes && w.Single:
		for i, p := range pages {
			at := time.Since(epoch)
			mem[p*wordsPage] = uint64(p)
			r.Times[i] = int64(time.Since(epoch) - at)
		}
	case writes:
		for _, p := range pages {
			mem[p*wordsPage] = uint64(p)
		}
	case w.Single:
		for i, p := range pages {
			at := time.Since(epoch)
			sum += mem[p*wordsPage]
			r.Times[i] = int64(time.Since(epoch) - at)
		}
	default:
		for _, p := range pages {
			sum += mem[p*wordsPage]
		}
	}
	r.Total = int64(time.Since(epoch) - begin)
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &after); err != nil {
		return r, fmt.Errorf("getrusage: %w", err)
	}
	r.Faults = after.Majflt + after.Minflt - before.Majflt - before.Minflt
	return r, verify(t, pages, sum, writes)
}

// verify says whether what was read, or what stands there after the writes, is right.
func verify(t *target, pages []int, sum uint64, writes bool) error {
	var want uint64
	mem := words(t.mem)
	for _, p := range pages {
		switch {
		case writes && mem[p*wordsPage] != uint64(p):
			return fmt.Errorf("page %d reads %#x after %#x was written", p, mem[p*wordsPage], p)
		case !writes && t.stored:
			want += pattern(p)
		}
	}
	if !writes && sum != want {
		return fmt.Errorf("the words of %d pages add up to %#x instead of %#x: wrong contents", len(pages), sum, want)
	}
	return nil
}

// order lists every step-th of n pages, as w.Order says.
func order(w workload, n, step int) []int {
	pages := make([]int, 0, n/step)
	for p := 0; p < n; p += step {
		pages = append(pages, p)
	}
	if w.Order == Random {
		r := rand.New(rand.NewPCG(w.Seed, 1))
		r.Shuffle(len(pages), func(i, j int) { pages[i], pages[j] = pages[j], pages[i] })
	}
	return pages
}
