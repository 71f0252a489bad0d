package storetest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/store"
)

// Restart is a store that outlives its process.
type Restart struct {
	// Memories and Files are the names of what lasts.
	Memories, Files []string
	// Open opens the store on it. At first it is all empty. The suite calls Rebuild, and closes it.
	Open func(l *Lasting) (store.Store, error)
	// Churn is called over and over while the store is used, to move things about. nil: nothing does.
	Churn func(l *Lasting, s store.Store) error
	// Check looks at a store that was taken over and has so many slots used, and again when none is. nil: nothing to look at.
	Check func(t testing.TB, s store.Store, used int64)
	// Failpoints are those that must have killed it.
	Failpoints []string
	// Capacity is how many slots can be allocated; 0: not looked at.
	Capacity int
}

// A tenant is a goroutine that uses a store in a manager's way, with a page map of words that last: version above slot. What a page has follows from its version.
const (
	tenants     = 3
	tenantPages = 96
	slotBits    = 24
	restartEnv  = "MACHPAGER_STORETEST" // "base;steps;failpoints": this process is the one that is killed
	mapName     = "storetest map"
)

// Run kills processes that use the store, at each of its failpoints and at random instants, and stops others to look at copies of what would be left. Each time the
// store is opened again on that: every page that was committed is there byte for byte, and all other slots are free. It must be called by a test of its
// own, first thing: that test is what the other processes run.
func (r Restart) Run(t *testing.T) {
	r.Memories = append([]string{mapName}, r.Memories...)
	if spec := os.Getenv(restartEnv); spec != "" {
		r.tenancy(spec)
	}
	t.Run("killed at failpoints", func(t *testing.T) {
		l := newLasting(t, r.Memories, r.Files)
		hits := r.count(t, l)
		killed := map[string]bool{}
		names := make([]string, 0, len(hits))
		for name := range hits {
			names = append(names, name)
		}
		slices.Sort(names)
		rng := rand.New(rand.NewPCG(1, uint64(len(names))))
		for round := range 1 + int(soak/(10*time.Second)) {
			for i, name := range names {
				if hits[name] <= 4 { // it comes at the beginning only
					l = newLasting(t, r.Memories, r.Files)
				}
				n := 1 + rng.Int64N(max(1, hits[name]/2))
				for try := 0; try < 10; try++ { // what moves in the background does so when it likes
					c := r.start(t, l, 2+round*len(names)+i, 400, fmt.Sprintf("%s=%d:kill", name, n))
					ws := c.wait(t)
					if ws.Signaled() {
						killed[name] = true
					} else if ws.ExitStatus() != 0 {
						c.failed(t, ws)
					}
					r.verify(t, l.copy(t), "killed at "+name)
					if killed[name] {
						break
					}
					n = 1
				}
			}
		}
		for _, name := range r.Failpoints {
			if !killed[name] {
				t.Errorf("never killed at %q; met were %v", name, names)
			}
		}
	})
	t.Run("killed at random", func(t *testing.T) {
		l := newLasting(t, r.Memories, r.Files)
		rng := rand.New(rand.NewPCG(2, 2))
		for i := range 8 {
			c := r.start(t, l, i, 0, "")
			if i%4 != 3 { // else within Rebuild, perhaps
				c.ready(t)
			}
			time.Sleep(time.Duration(rng.Int64N(int64(8 * time.Millisecond))))
			unix.Kill(c.pid, unix.SIGKILL)
			if ws := c.wait(t); !ws.Signaled() {
				c.failed(t, ws)
			}
			r.verify(t, l.copy(t), fmt.Sprintf("killed at random, number %d", i))
		}
	})
	t.Run("stopped", func(t *testing.T) {
		l := newLasting(t, r.Memories, r.Files)
		rng := rand.New(rand.NewPCG(3, 3))
		c := r.start(t, l, 0, 0, "")
		c.ready(t)
		for i := range 20 {
			time.Sleep(time.Duration(rng.Int64N(int64(2 * time.Millisecond))))
			unix.Kill(c.pid, unix.SIGSTOP)
			if ws := c.wait(t); !ws.Stopped() {
				c.failed(t, ws)
			}
			left := l.copy(t)
			unix.Kill(c.pid, unix.SIGCONT)
			r.verify(t, left, fmt.Sprintf("stopped, number %d", i))
		}
		unix.Kill(c.pid, unix.SIGKILL)
		c.wait(t)
	})
}

// count runs a life without a kill, and tells which failpoints it met how often.
func (r *Restart) count(t *testing.T, l *Lasting) (hits map[string]int64) {
	t.Helper()
	c := r.start(t, l, 1, 400, "none=1:count")
	c.ready(t)
	out, err := io.ReadAll(c.out)
	if ws := c.wait(t); !ws.Exited() || ws.ExitStatus() != 0 {
		c.failed(t, ws)
	}
	if err = errors.Join(err, json.Unmarshal(out, &hits)); err != nil {
		t.Fatalf("failpoints met: %q: %v", out, err)
	}
	r.verify(t, l.copy(t), "ended")
	return hits
}

// child is a process that uses the store.
type child struct {
	pid int
	out *os.File // what it says: one byte when it has taken over, failpoints at its end
	err *os.File // its last words
}

func (r *Restart) start(t *testing.T, l *Lasting, base, steps int, points string) *child {
	t.Helper()
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	c := &child{out: out}
	if c.err, err = unnamed(l.dir); err != nil {
		t.Fatal(err)
	}
	test, _, _ := strings.Cut(t.Name(), "/")
	p, err := os.StartProcess(os.Args[0], []string{os.Args[0], "-test.run=^" + test + "$", "-test.timeout=60s"}, &os.ProcAttr{
		Env: append(os.Environ(), "GORACE=atexit_sleep_ms=0", // else the race detector sleeps for a second at each end
			fmt.Sprintf("%s=%d;%d;%s", restartEnv, base, steps, points)),
		Files: append([]*os.File{nil, in, c.err}, l.held...),
	})
	if err != nil {
		t.Fatal(err)
	}
	c.pid = p.Pid
	p.Release()
	t.Cleanup(func() {
		if c.pid != 0 {
			unix.Kill(c.pid, unix.SIGKILL)
			c.wait(t)
		}
		c.out.Close()
		c.err.Close()
	})
	return c
}

// ready waits until the child has taken over.
func (c *child) ready(t *testing.T) {
	t.Helper()
	c.out.SetReadDeadline(time.Now().Add(Deadline))
	if _, err := io.ReadFull(c.out, make([]byte, 1)); err != nil {
		c.failed(t, c.wait(t))
	}
}

// wait waits until the child stands still, or has ended.
func (c *child) wait(t testing.TB) (ws unix.WaitStatus) {
	t.Helper()
	timer := time.AfterFunc(Deadline, func() { unix.Kill(c.pid, unix.SIGQUIT) }) // it tells its stacks
	defer timer.Stop()
	for {
		_, err := unix.Wait4(c.pid, &ws, unix.WUNTRACED, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatalf("wait for process: %v", err)
		}
		if !ws.Stopped() {
			c.pid = 0
		}
		return ws
	}
}

func (c *child) failed(t *testing.T, ws unix.WaitStatus) {
	t.Helper()
	words, _ := io.ReadAll(io.NewSectionReader(c.err, 0, 1<<20))
	t.Fatalf("the process that uses the store: status %#x: %s", uint32(ws), words)
}

// verify takes over what is left, looks at all of it, and frees it.
func (r *Restart) verify(t *testing.T, l *Lasting, when string) {
	t.Helper()
	defer l.close()
	m, err := l.pageMap()
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	defer m.mem.Close()
	s, err := r.Open(l)
	if err != nil {
		t.Fatalf("%s: open: %v", when, err)
	}
	defer s.Close()
	if err := s.Rebuild(m.used); err != nil {
		t.Fatalf("%s: rebuild: %v", when, err)
	}
	used := int64(0)
	for page := range m.words {
		if err := m.check(s, page); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if m.words[page].Load() != 0 {
			used++
		}
	}
	look := func() {
		t.Helper()
		if got := s.Info().Used; got != used*store.SlotSize {
			t.Fatalf("%s: %d slots are used for %d pages", when, got/store.SlotSize, used)
		}
		if r.Check != nil {
			r.Check(t, s, used)
		}
	}
	look()
	for page := range m.words {
		if w := m.words[page].Swap(0); w != 0 {
			s.Free(wordSlot(w), 1)
		}
	}
	used = 0
	look()
	end := time.Now().Add(Deadline)
	for free := 0; r.Capacity > 0; {
		_, n, err := s.Alloc(min(64, max(1, r.Capacity-free)), 1)
		free += n
		switch {
		case err == nil:
		case !errors.Is(err, store.ErrNoSpace) || free > r.Capacity || time.Now().After(end):
			t.Fatalf("%s: %d of %d slots can be allocated: %v", when, free, r.Capacity, err)
		case free == r.Capacity:
			return
		default: // some are just being given back
			time.Sleep(time.Millisecond)
		}
	}
}

// pageMap is a page map that lasts.
type pageMap struct {
	mem   store.Memory
	words []atomic.Uint64
}

func wordSlot(w uint64) store.Slot { return store.Slot(w & (1<<slotBits - 1)) }

func (l *Lasting) pageMap() (*pageMap, error) {
	mem, err := l.Memory(mapName)
	if err == nil {
		err = mem.Grow(tenants * tenantPages * 8)
	}
	if err != nil {
		return nil, fmt.Errorf("open page map: %w", err)
	}
	return &pageMap{mem, mem.Words()[:tenants*tenantPages]}, nil
}

func (m *pageMap) used(yield func(store.Slot, int) bool) {
	for i := range m.words {
		if w := m.words[i].Load(); w != 0 && !yield(wordSlot(w), 1) {
			return
		}
	}
}

func fillVersion(b []byte, w uint64) {
	version := w >> slotBits
	FillKind(b, Kind(version%uint64(Kinds)), version)
}

// check compares a page with what its word says.
func (m *pageMap) check(s store.Store, page int) error {
	w := m.words[page].Load()
	if w == 0 {
		return nil
	}
	got, want := make([]byte, store.SlotSize), make([]byte, store.SlotSize)
	if op := await(s.Read, wordSlot(w), got); op.Err != nil {
		return fmt.Errorf("page %d: %w", page, op.Err)
	}
	if fillVersion(want, w); !bytes.Equal(got, want) {
		return fmt.Errorf("page %d, slot %d, version %#x: wrong contents", page, wordSlot(w), w>>slotBits)
	}
	return nil
}

func await(call func(*store.Op), slot store.Slot, data []byte) *store.Op {
	done := make(chan struct{})
	op := &store.Op{Slot: slot, Data: data, Done: func(*store.Op) { close(done) }}
	call(op)
	<-done
	return op
}

// tenancy is the life of the process that is killed.
func (r *Restart) tenancy(spec string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	part := strings.SplitN(spec, ";", 3)
	base, err1 := strconv.ParseUint(part[0], 10, 32)
	steps, err2 := strconv.Atoi(part[1])
	l := inherited(3, r.Memories, r.Files)
	m, err3 := l.pageMap()
	if err := errors.Join(err1, err2, err3, failpoint.Arm(part[2])); err != nil {
		fail(err)
	}
	s, err := r.Open(l)
	if err == nil {
		err = s.Rebuild(m.used)
	}
	if err != nil {
		fail(err)
	}
	os.Stdout.Write([]byte{'r'})
	var wg sync.WaitGroup
	var versions atomic.Uint64
	versions.Store(base << 20)
	for g := range tenants {
		wg.Go(func() {
			x := &tenant{s: s, m: m, first: g * tenantPages, rng: rand.New(rand.NewPCG(base, uint64(g))), versions: &versions}
			for i := 0; steps == 0 || i < steps; i++ {
				if err := x.step(); err != nil {
					fail(err)
				}
			}
		})
	}
	if r.Churn != nil {
		go func() {
			for {
				if err := r.Churn(l, s); err != nil {
					fail(err)
				}
			}
		}()
	}
	wg.Wait()
	hits, err := json.Marshal(failpoint.Hits())
	if err != nil {
		fail(err)
	}
	os.Stdout.Write(hits)
	os.Exit(0)
}

type tenant struct {
	s        store.Store
	m        *pageMap
	first    int
	rng      *rand.Rand
	versions *atomic.Uint64
}

func (x *tenant) step() error {
	page := x.first + x.rng.IntN(tenantPages)
	n := min(1+x.rng.IntN(16), x.first+tenantPages-page)
	switch x.rng.IntN(8) {
	default:
		return x.write(page, n)
	case 0:
		for i := range min(n, 6) {
			if w := x.m.words[page+i].Swap(0); w != 0 {
				x.s.Free(wordSlot(w), 1)
			}
		}
		return nil
	case 1, 2:
		return x.m.check(x.s, page)
	}
}

// write writes pages to new slots, commits them, and frees the old ones; or thinks better of it.
func (x *tenant) write(page, n int) error {
	slot, n, err := x.s.Alloc(n, 1)
	if err != nil {
		if errors.Is(err, store.ErrNoSpace) {
			return nil
		}
		return err
	}
	words, data := make([]uint64, n), make([]byte, n*store.SlotSize)
	for i := range words {
		words[i] = x.versions.Add(1)<<slotBits | uint64(slot) + uint64(i)
		fillVersion(data[i*store.SlotSize:(i+1)*store.SlotSize], words[i])
	}
	if op := await(x.s.Write, slot, data); op.Err != nil || x.rng.IntN(10) == 0 {
		x.s.Free(slot, n)
		if errors.Is(op.Err, store.ErrNoSpace) {
			return nil
		}
		return op.Err
	}
	for i := range words {
		if old := x.m.words[page+i].Swap(words[i]); old != 0 {
			x.s.Free(wordSlot(old), 1)
		}
	}
	return nil
}
