//go:build linux

package demo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
	"machpager/region"
)

// What a task can be asked to do.
const (
	doMap     = "map"      // dial Socket; make an object of Size if there is no Port, or open it; map it
	doCopy    = "copy"     // copy File into the memory by touching it
	doHash    = "hash"     // SHA-256 over the memory
	doRewrite = "rewrite"  // read each page, and write back what is there
	doPageOut = "page out" // all of it
)

// request is one line to a task.
type request struct {
	Do     string
	Socket string `json:",omitempty"`
	Port   string `json:",omitempty"`
	Size   int64  `json:",omitempty"`
	File   string `json:",omitempty"`
}

// report is one line from a task: how far it is, or Done.
type report struct {
	Done     bool
	Err      string     `json:",omitempty"`
	Errno    unix.Errno `json:",omitempty"` // that Err is about
	Port     string     `json:",omitempty"` // after map
	PageSize int        `json:",omitempty"` // after map
	Hash     string     `json:",omitempty"` // after hash
	Bytes    int64      // how far, in this step
	Counts   Counts     // of this step, as the pager counts them
	Touch    Latency    // of this step, as the thread sees them
	Elapsed  time.Duration
}

// Counts are faults and pages of one step.
type Counts struct {
	ZeroFilled   uint64 `json:"zero_filled"`
	Stored       uint64 `json:"stored"`
	Minor        uint64 `json:"minor"`
	WriteProtect uint64 `json:"write_protect"`
	PagesIn      uint64 `json:"pages_in"`
	PagesOut     uint64 `json:"pages_out"`
}

func counts(s region.Stats) Counts {
	return Counts{ZeroFilled: s.ZeroFilled, Stored: s.Stored, Minor: s.Minor, WriteProtect: s.WriteProtect, PagesIn: s.PagesIn, PagesOut: s.PagesOut}
}

func (c Counts) sub(d Counts) Counts {
	return Counts{c.ZeroFilled - d.ZeroFilled, c.Stored - d.Stored, c.Minor - d.Minor, c.WriteProtect - d.WriteProtect, c.PagesIn - d.PagesIn, c.PagesOut - d.PagesOut}
}

// Faults is how many faults there were, of all kinds.
func (c Counts) Faults() uint64 { return c.ZeroFilled + c.Stored + c.Minor + c.WriteProtect }

// Latency is how long the touches took that met a fault, as the faulting thread sees it. The kernel answers some of them alone: a page that the pager has made
// writable ahead of a stream of writes still has a first write.
type Latency struct {
	Faults int           `json:"faults"`
	P50    time.Duration `json:"p50_ns"`
	P99    time.Duration `json:"p99_ns"`
}

// task is the state of a task process.
type task struct {
	*lines
	pager  *region.Pager
	object *region.Object
	region *region.Region
	done   atomic.Int64 // bytes of the step
}

func taskMain(ctx context.Context, l *lines) error {
	t := &task{lines: l}
	for {
		var req request
		if err := l.dec.Decode(&req); err != nil {
			if t.pager != nil {
				err = errors.Join(ignore(err, io.EOF), t.pager.Close())
			}
			return ignore(err, io.EOF)
		}
		r, err := t.step(ctx, req)
		r.Done = true
		if err != nil {
			r.Err = err.Error()
			errors.As(err, &r.Errno)
		}
		if err := l.enc.Encode(r); err != nil {
			return err
		}
	}
}

func ignore(err, which error) error {
	if errors.Is(err, which) {
		return nil
	}
	return err
}

// step does one request, and reports ten times a second how far it is.
func (t *task) step(ctx context.Context, req request) (r report, err error) {
	if req.Do == doMap {
		return t.open(ctx, req)
	}
	if t.region == nil {
		return r, errors.New("nothing is mapped")
	}
	before, begin := counts(t.region.Stats()), time.Now()
	t.done.Store(0)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				t.enc.Encode(report{Bytes: t.done.Load(), Counts: counts(t.region.Stats()).sub(before), Elapsed: time.Since(begin)})
			}
		}
	}()
	var lat stopwatch
	err = region.Guard(func() error {
		switch req.Do {
		case doCopy:
			return t.copyFile(req.File, &lat)
		case doHash:
			h := sha256.New()
			defer func() { r.Hash = hex.EncodeToString(h.Sum(nil)) }()
			return t.hash(h, &lat)
		case doRewrite:
			return t.rewrite(&lat)
		case doPageOut:
			return t.region.PageOut(ctx, 0, t.region.Size())
		}
		return fmt.Errorf("unknown request %q", req.Do)
	})
	r.Elapsed = time.Since(begin)
	close(stop)
	<-stopped
	r.Bytes, r.Counts, r.Touch = t.done.Load(), counts(t.region.Stats()).sub(before), lat.latency()
	return r, err
}

func (t *task) open(ctx context.Context, req request) (r report, err error) {
	if t.pager, err = region.Dial(ctx, req.Socket, nil); err != nil {
		return r, err
	}
	if req.Port == "" {
		t.object, err = t.pager.ObjectCreate(ctx, req.Size, nil)
	} else {
		var port emm.Port
		if port, err = emm.ParsePort(req.Port); err == nil {
			t.object, err = t.pager.ObjectOpen(ctx, port)
		}
	}
	if err != nil {
		return r, err
	}
	r.Port, r.PageSize = t.object.Port().String(), t.object.PageSize()
	t.region, err = t.object.Map(ctx, nil)
	return r, err
}

// each calls f for every page of the memory, in order.
func (t *task) each(f func(page []byte) error) error {
	mem, size := t.region.Bytes(), t.region.PageSize()
	for len(mem) > 0 {
		page := mem[:min(size, len(mem))]
		if err := f(page); err != nil {
			return err
		}
		t.done.Add(int64(len(page)))
		mem = mem[len(page):]
	}
	return nil
}

// copyFile fills the memory with the file, by ordinary stores.
func (t *task) copyFile(name string, lat *stopwatch) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, t.region.PageSize())
	return t.each(func(page []byte) error {
		if _, err := io.ReadFull(f, buf[:len(page)]); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		lat.touch(func() { page[0] = buf[0] })
		copy(page, buf)
		return nil
	})
}

// sink keeps a load from being taken for useless.
var sink atomic.Uint32

func (t *task) hash(h hash.Hash, lat *stopwatch) error {
	return t.each(func(page []byte) error {
		lat.touch(func() { sink.Store(uint32(page[0])) })
		h.Write(page)
		return nil
	})
}

// rewrite reads a byte of each page and writes it back: a clean page becomes dirty by it.
func (t *task) rewrite(lat *stopwatch) error {
	return t.each(func(page []byte) error {
		lat.touch(func() { sink.Store(uint32(page[0])) })
		lat.touch(func() { page[0] = byte(sink.Load()) })
		return nil
	})
}

// stopwatch takes the time of touches, and keeps those that met a fault: the kernel counts faults for each thread.
type stopwatch struct {
	took   []time.Duration
	faults int64 // of this thread so far
	locked bool
}

// maxTouches bounds the memory that the times take.
const maxTouches = 1 << 20

func (s *stopwatch) touch(f func()) {
	if !s.locked {
		runtime.LockOSThread() // for good: the count is the thread's
		s.locked, s.faults = true, threadFaults()
	}
	begin := time.Now()
	f()
	took := time.Since(begin)
	if n := threadFaults(); n != s.faults {
		s.faults = n
		if len(s.took) < maxTouches {
			s.took = append(s.took, took)
		}
	}
}

// threadFaults is how many page faults this thread has met.
func threadFaults() int64 {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_THREAD, &u) != nil {
		return 0
	}
	return u.Minflt + u.Majflt
}

func (s *stopwatch) latency() Latency {
	n := len(s.took)
	if n == 0 {
		return Latency{}
	}
	slices.Sort(s.took)
	return Latency{Faults: n, P50: s.took[n/2], P99: s.took[min(n-1, n*99/100)]}
}
