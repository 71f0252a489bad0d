//go:build linux

package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"machpager/region"
)

// pagingHello is the first line that the driver of [Paging] sends to a client.
type pagingHello struct {
	Socket string // of the pager; "": map files in Dir
	Dir    string
	Group  *groupOf // nil: none
	OneCPU bool     // everything on one CPU
	PID    int      // of the pager
	Budget int64    // bytes
}

// groupOf names a group to a client.
type groupOf struct {
	Dir     string
	Unified bool
}

// pagingJob is what the driver asks of a client.
type pagingJob struct {
	Do    string // "open" memory, "run" a work on it, "close" it, after a look at every byte
	Size  int64  // of the memory to open, in bytes
	Work  Work
	Seed  uint64
	Graph graphSpec
}

// pagingResult is the answer.
type pagingResult struct {
	Time    int64   // ns
	Bytes   int64   // that the work went through
	Faults  int64   // that the kernel counted
	In, Out int64   // bytes from the store and to it
	Evicted int64   // bytes; -1: unknown
	CPU     int64   // ns of the pager's
	Value   float64 // of a work that is no throughput
	Err     failure
	Wrong   bool // Err is about wrong contents
}

type pagingClient struct {
	hello    pagingHello
	pager    *region.Pager
	group    *group
	memory   pagedMemory
	contents *contents
}

// pagingMain is the client's main.
func pagingMain() error {
	runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0))) // two may stand still in faults
	debug.SetGCPercent(-1)                            // a collection would stop the world, and wait for the fault
	debug.SetMemoryLimit(4 << 30)
	lines := jobLines()
	c := new(pagingClient)
	if err := json.Unmarshal(<-lines, &c.hello); err != nil {
		return err
	}
	if err := c.start(); err != nil {
		return err
	}
	runtime.LockOSThread()
	return serveJobs(lines, func(j pagingJob) pagingResult {
		r, err := c.do(j)
		if err != nil {
			r.Err, r.Wrong = failed(err), errors.As(err, new(wrongError))
		}
		return r
	})
}

func (c *pagingClient) start() error {
	h := c.hello
	if h.Group != nil {
		c.group = &group{h.Group.Dir, h.Group.Unified}
		if err := c.group.join(os.Getpid()); err != nil {
			return err
		}
	}
	if h.Socket != "" {
		ctx, cancel := context.WithTimeout(context.Background(), pagerLimit)
		defer cancel()
		var err error
		if c.pager, err = region.Dial(ctx, h.Socket, nil); err != nil {
			return err
		}
	}
	if h.OneCPU {
		allowed := new(unix.CPUSet)
		if err := unix.SchedGetaffinity(0, allowed); err != nil {
			return fmt.Errorf("get affinity: %w", err)
		}
		for _, pid := range []int{os.Getpid(), h.PID} {
			if err := pin(pid, lastCPU(allowed)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *pagingClient) do(j pagingJob) (r pagingResult, err error) {
	switch j.Do {
	case "open":
		return r, c.open(j)
	case "run":
		return c.run(j)
	case "close":
		var err error
		if j.Work != Sort && j.Work != Search { // they leave something else
			err = c.contents.compare(c.memory.bytes())
		}
		err = errors.Join(err, c.memory.close())
		c.memory, c.contents = nil, nil
		debug.FreeOSMemory()
		return r, err
	}
	return r, fmt.Errorf("unknown job %q", j.Do)
}

// open makes memory with the first version of its contents.
func (c *pagingClient) open(j pagingJob) (err error) {
	if c.group != nil {
		if err := c.group.unlimit(); err != nil {
			return err
		}
	}
	if c.pager == nil {
		c.memory, err = openFileMemory(c.hello.Dir, j.Size)
	} else {
		c.memory, err = openRegion(context.Background(), c.pager, j.Size)
	}
	if err != nil {
		return err
	}
	mem := c.memory.bytes()
	c.contents = newContents(len(mem) / pageSize)
	for p := range c.contents.version {
		c.contents.write(mem, p)
	}
	return nil
}

// limit sets the group's limit, with nothing resident: what the group has then is what the processes need for themselves.
func (c *pagingClient) limit() error {
	if c.group == nil {
		return nil
	}
	if err := errors.Join(c.group.unlimit(), c.memory.cold()); err != nil {
		return err
	}
	n := c.hello.Budget
	if c.pager != nil {
		n += inFlight
	}
	return c.group.limit(n)
}

// inFlight is what a pager in a group gets beyond the budget, in bytes: for its heap to grow, and page cache of what is on the
// way to the device or from it. With less it would be killed.
const inFlight = 16 << 20

// run measures one work.
func (c *pagingClient) run(j pagingJob) (r pagingResult, err error) {
	w := worker{mem: c.memory.bytes(), contents: c.contents, budget: int(c.hello.Budget / pageSize), random: rand.New(rand.NewPCG(j.Seed, 5)),
		memory: c.memory, graph: j.Graph}
	if err := c.limit(); err != nil {
		return r, err
	}
	body, err := w.prepare(j.Work)
	if err != nil {
		return r, err
	}
	var before, after unix.Rusage
	from, err := c.memory.counters()
	if err == nil {
		err = unix.Getrusage(unix.RUSAGE_SELF, &before)
	}
	if err != nil {
		return r, err
	}
	cpu, begin := cpuTime(c.hello.PID), time.Now()
	err = body()
	r.Time = int64(time.Since(begin))
	r.CPU = cpuTime(c.hello.PID) - cpu
	if err = errors.Join(err, unix.Getrusage(unix.RUSAGE_SELF, &after)); err != nil {
		return r, err
	}
	to, err := c.memory.counters()
	if err != nil {
		return r, err
	}
	r.Faults = after.Majflt + after.Minflt - before.Majflt - before.Minflt
	r.In, r.Out, r.Evicted = to.In-from.In, to.Out-from.Out, -1
	if to.Resident >= 0 {
		r.Evicted = r.In - (to.Resident - from.Resident)
	}
	r.Bytes, r.Value = w.bytes, w.value
	if w.time != 0 {
		r.Time = w.time
	}
	if w.finish != nil {
		err = w.finish()
	}
	return r, err
}
