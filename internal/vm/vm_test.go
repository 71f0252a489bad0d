package vm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"machpager/internal/arena"
	"machpager/internal/frames"
	"machpager/pager/emm"
)

// shelf is a memory manager that keeps the pages of one object in a Go map: the simplest there can be.
type shelf struct {
	mu     sync.Mutex
	pages  map[int64][]byte
	size   int64
	fail   atomic.Bool // answers requests with data_error, returns with a failure
	forget atomic.Bool // leaves requests unanswered
	log    []string
	ctl    emm.Control
}

func (s *shelf) Init(h emm.Head, pageSize int) emm.KernReturn {
	s.pages, s.size, s.ctl = map[int64][]byte{}, int64(pageSize), h.Control
	return h.Control.ChangeAttributes(emm.Attributes{}, false)
}

func (s *shelf) Create(h emm.Head, object emm.Port, size int64, pageSize int) emm.KernReturn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pages, s.size = map[int64][]byte{}, int64(pageSize)
	return emm.Success
}

func (s *shelf) DataInitialize(h emm.Head, off int64, data []byte) emm.KernReturn {
	s.mu.Lock()
	for i := int64(0); i < int64(len(data)); i += s.size {
		if s.pages[off+i] != nil {
			s.log = append(s.log, fmt.Sprintf("initialize of page %d, which is there", (off+i)/s.size))
		}
	}
	s.mu.Unlock()
	return s.DataReturn(h, off, data, true, false)
}

func (s *shelf) DataRequest(h emm.Head, want emm.Run, need int64, access emm.Prot) emm.KernReturn {
	if s.forget.Load() {
		return emm.Success
	}
	for off := want.Off; off < want.End(); off += s.size {
		s.mu.Lock()
		b := s.pages[off]
		s.mu.Unlock()
		switch {
		case s.fail.Load():
			h.Control.DataError(emm.Run{Off: off, Size: s.size}, emm.MemoryError)
		case b == nil:
			h.Control.DataUnavailable(emm.Run{Off: off, Size: s.size})
		default:
			h.Control.DataSupply(off, b, emm.ProtNone, false, false)
		}
	}
	return emm.Success
}

func (s *shelf) DataReturn(h emm.Head, off int64, data []byte, dirty, kernelCopy bool) emm.KernReturn {
	if s.fail.Load() {
		return h.Control.ReturnCompleted(emm.Run{Off: off, Size: int64(len(data))}, emm.Failure)
	}
	s.mu.Lock()
	for i := int64(0); i < int64(len(data)); i += s.size {
		s.pages[off+i] = bytes.Clone(data[i : i+s.size])
	}
	s.mu.Unlock()
	return h.Control.ReturnCompleted(emm.Run{Off: off, Size: int64(len(data))}, emm.Success)
}

func (s *shelf) Terminate(h emm.Head) emm.KernReturn { return emm.Success }

func newVM(t *testing.T, budget int64) *VM {
	t.Helper()
	pool, err := frames.Open(frames.Options{Budget: budget, Kind: frameKind})
	if err != nil {
		t.Fatal(err)
	}
	v, err := New(Options{Frames: pool, Log: slog.New(slog.NewTextHandler(testLog{t}, nil)), NewTable: func(id uint64, n int64) (Table, error) {
		a, err := arena.Create("pages", "test", 1, n)
		if err == nil {
			err = a.Grow(n)
		}
		return a, err
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s := v.Stats()
		t.Logf("%+v, %s", s, pool.Kind())
		v.Close()
		if n := pool.Reserved(); n != 0 {
			t.Errorf("%d frames still reserved after the end", n)
		}
		if n, err := pool.Usage(); err != nil || n != 0 {
			t.Errorf("%d bytes still used after the end, %v", n, err)
		}
		pool.Close()
	})
	return v
}

var frameKind frames.Kind

type testLog struct{ t *testing.T }

func (l testLog) Write(b []byte) (int, error) { l.t.Logf("%s", bytes.TrimSpace(b)); return len(b), nil }

func newObject(t testing.TB, v *VM, opt ObjectOptions) *Object {
	t.Helper()
	o, err := v.NewObject(opt)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func fillBytes(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) + seed
	}
	return b
}

func TestFaultPageOutFault(t *testing.T) { faultPageOutFault(t, false, true) }

// faultPageOutFault is for objects of a manager, and for internal ones.
func faultPageOutFault(t *testing.T, kinds ...bool) {
	for _, ps := range []int{4096, 65536, 2 << 20} {
		for _, cluster := range []int64{0, 65536, 2 << 20} {
			for _, internal := range kinds {
				t.Run(fmt.Sprintf("page=%d,cluster=%d,internal=%v", ps, cluster, internal), func(t *testing.T) {
					v := newVM(t, 64<<20)
					s := &shelf{}
					v.SetDefaultManager(s)
					opt := ObjectOptions{Size: 8 << 20, PageSize: ps, ClusterSize: cluster}
					if !internal {
						opt.Manager, opt.Port = s, emm.NewPort()
					}
					o := newObject(t, v, opt)
					x, y := startTask(t, v), startTask(t, v)
					m := x.mapObject(o, 1, 0, o.Size(), false)
					y.mapObject(o, 1, 0, o.Size(), false)
					ro := y.mapObject(o, 2, 0, o.Size(), true)
					want := make([]byte, o.Size())
					check := func(who *task, id int) {
						t.Helper()
						for off := int64(0); off < o.Size(); off += 65536 - 512 {
							n := min(3000, o.Size()-off)
							if got := who.read(id, off, n); !bytes.Equal(got, want[off:off+n]) {
								t.Fatalf("mapping %d offset %d: wrong bytes", id, off)
							}
						}
					}
					check(y, 2)
					check(x, 1)
					for round := range 3 {
						for i := range 40 {
							b := fillBytes(5000, byte(i+round))
							off := int64(i*197_123) % (o.Size() - 5000)
							x.write(1, off, b)
							copy(want[off:], b)
						}
						check(y, 1)
						check(y, 2)
						if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
							t.Fatal(err)
						}
						if st := o.Stats(); st.Resident != 0 {
							t.Fatalf("resident after page-out: %+v", st)
						}
						check(y, 2)
						check(x, 1)
						check(y, 1)
					}
					if len(s.log) > 0 {
						t.Error(s.log)
					}
					t.Logf("%+v", m.Stats())
					t.Logf("read-only %+v", ro.Stats())
				})
			}
		}
	}
}

// An instruction that needs four pages goes on under a budget of eight, whoever else wants them.
func TestSmallestBudget(t *testing.T) {
	for _, ps := range []int{4096, 65536} {
		t.Run(fmt.Sprint(ps), func(t *testing.T) {
			v := newVM(t, int64(8*ps))
			x, y := startTask(t, v), startTask(t, v)
			var wg sync.WaitGroup
			for _, z := range []*task{x, y} {
				for id := range 2 {
					o := newObject(t, v, ObjectOptions{Size: 64 * int64(2*ps), PageSize: ps, Manager: &shelf{}, Port: emm.NewPort()})
					z.mapObject(o, id, 0, o.Size(), false)
				}
				wg.Go(func() {
					if r := z.do(order{Op: "copies", ID: 0, Threads: 64, Slots: 2, Seconds: 30}, nil); r.Wrong > 0 {
						t.Errorf("%d wrong copies", r.Wrong)
					}
				})
			}
			wg.Wait()
			if used, err := v.frames.Usage(); err != nil || used > int64(8*ps) {
				t.Errorf("%d bytes in use, %v", used, err)
			}
		})
	}
}

func TestErrorHealsAndAsksAgain(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: s, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(o, 1, 0, o.Size(), false)
	x.write(1, 4096, []byte("kept"))
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	s.fail.Store(true)
	if x.read(1, 4096, 4) != nil || y.read(1, 4096, 4) != nil || x.read(1, 8192, 4) != nil {
		t.Fatal("a touch succeeded though the manager fails")
	}
	if err := m.FaultReason(4096); err != emm.MemoryError {
		t.Fatalf("reason: %v", err)
	}
	if err := m.Populate(context.Background(), 0, o.Size(), false); err == nil {
		t.Fatal("populate succeeded though the manager fails")
	}
	x.write(1, 1<<19, []byte("new")) // absent too
	if x.read(1, 4096, 4) != nil {
		t.Fatal("poison is gone though nobody healed it")
	}
	s.fail.Store(false)
	x.do(order{Op: "drop", ID: 1, Off: 4096, N: 4096}, nil)
	if got := x.read(1, 4096, 4); string(got) != "kept" {
		t.Fatalf("after dropping the marker: %q", got)
	}
	deadline := time.Now().Add(5 * time.Second)
	for y.read(1, 4096, 4) == nil { // nobody dropped y's marker: the vm heals it
		if time.Now().After(deadline) {
			t.Fatal("not healed")
		}
		time.Sleep(20 * time.Millisecond)
	}
	if got := y.read(1, 4096, 4); string(got) != "kept" {
		t.Fatalf("healed: %q", got)
	}
	s.fail.Store(true)
	x.write(1, 0, []byte("dirty"))
	x.do(order{Op: "drop", ID: 1, Off: 0, N: 4096}, nil)
	s.fail.Store(false)
	x.write(1, 0, []byte("dirty"))
	s.fail.Store(true)
	if err := o.PageOut(context.Background(), 0, 4096); err == nil {
		t.Fatal("page-out succeeded though the manager fails")
	}
	if got := x.read(1, 0, 5); string(got) != "dirty" {
		t.Fatalf("a page that could not be stored: %q", got)
	}
	s.fail.Store(false)
}

func TestDiscardAndWire(t *testing.T) {
	for _, internal := range []bool{false, true} {
		v := newVM(t, 4<<20)
		s := &shelf{}
		v.SetDefaultManager(s)
		opt := ObjectOptions{Size: 16 << 20}
		if !internal {
			opt.Manager, opt.Port = s, emm.NewPort()
		}
		o := newObject(t, v, opt)
		x, y := startTask(t, v), startTask(t, v)
		m := x.mapObject(o, 1, 0, o.Size(), false)
		y.mapObject(o, 1, 0, o.Size(), false)
		ctx := context.Background()
		b := fillBytes(3<<20, 5)
		for off := 0; off < len(b); off += 65536 {
			x.write(1, int64(off), b[off:off+65536])
		}
		if err := o.PageOut(ctx, 1<<20, 1<<20); err != nil {
			t.Fatal(err)
		}
		if !internal {
			s.fail.Store(true)
			if err := o.Discard(ctx, 0, 1<<20); err == nil {
				t.Fatal("discard succeeded though the manager fails")
			}
			s.fail.Store(false)
			if got := y.read(1, 4096, 100); !bytes.Equal(got, b[4096:4196]) {
				t.Fatal("a discard that failed has changed the contents")
			}
		}
		if err := o.Discard(ctx, 4096-100, 2<<20); err != nil {
			t.Fatal(err)
		}
		want := bytes.Clone(b)
		clear(want[4096 : 2<<20])
		for off := 0; off < len(b); off += 4096 {
			if got := y.read(1, int64(off), 4096); !bytes.Equal(got, want[off:off+4096]) {
				t.Fatalf("offset %d is wrong after discard", off)
			}
		}
		if err := m.Wire(ctx, 0, o.Size()); !errors.Is(err, emm.ResourceShortage) {
			t.Fatalf("wiring more than the budget: %v", err)
		}
		if n := v.wired.Load(); n != 0 {
			t.Fatalf("%d frames wired after a wire that failed", n)
		}
		if err := m.Wire(ctx, 0, 2<<20); err != nil {
			t.Fatal(err)
		}
		if err := m.Wire(ctx, 1<<20, 1<<20); err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < o.Size(); off += 4096 { // a scan that needs all the rest
			y.read(1, off, 1)
		}
		if err := o.PageOut(ctx, 0, o.Size()); err != nil {
			t.Fatal(err)
		}
		present := int64(0)
		o.file.Present(0, 2<<20, func(_, n int64) bool { present += n; return true })
		if present != 2<<20 {
			t.Fatalf("%d bytes of 2 MiB wired are resident", present)
		}
		if err := m.Unwire(2<<20, 4096); err == nil {
			t.Fatal("unwired what is not wired")
		}
		if err := m.Unwire(0, 2<<20); err != nil {
			t.Fatal(err)
		}
		if n := v.wired.Load(); n != 256 {
			t.Fatalf("%d frames wired, want 256", n)
		}
		m.Close()
		if n := v.wired.Load(); n != 0 {
			t.Fatalf("%d frames wired after the mapping closed", n)
		}
	}
}

func TestSnapshotIsConsistent(t *testing.T) {
	v := newVM(t, 1<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 64 * 4096, Manager: s, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(o, 1, 0, o.Size(), false)
	var wg sync.WaitGroup
	for i, z := range []*task{x, y} {
		wg.Go(func() {
			r := z.do(order{Op: "causal", ID: 1, N: o.Size(), Off: int64(8 * i), Seconds: 2}, nil)
			t.Logf("task %d: %d rounds", i, r.Ops)
		})
	}
	taken, newest := 0, uint64(0)
	for end := time.Now().Add(1800 * time.Millisecond); time.Now().Before(end); taken++ {
		copied := map[int64][]byte{}
		if err := o.Snapshot(context.Background(), func(emm.Port) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			maps.Copy(copied, s.pages) // a page that is returned later is a new slice
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for task := range 2 {
			last := ^uint64(0)
			for p := range o.npages() {
				val := uint64(0)
				if b := copied[p<<12]; b != nil {
					val = binary.LittleEndian.Uint64(b[8*task:])
				}
				if val > last || last != ^uint64(0) && val+1 < last {
					t.Fatalf("snapshot %d, task %d: page %d has %d, the one before it %d", taken, task, p, val, last)
				}
				last = val
			}
			newest = max(newest, last)
		}
	}
	wg.Wait()
	if taken < 10 || newest == 0 {
		t.Fatalf("%d snapshots, newest value %d: nothing was shown", taken, newest)
	}
	t.Logf("%d snapshots, newest value %d", taken, newest)
}

func TestStress(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, c := range []struct {
		budget, size int64
		ps           int
		cluster      int64
		tasks        int
	}{{4 << 20, 16 << 20, 4096, 0, 2}, {1 << 20, 8 << 20, 4096, 65536, 3}, {64 << 20, 16 << 20, 4096, 2 << 20, 2}, {4 << 20, 16 << 20, 65536, 0, 2}, {20 << 20, 24 << 20, 2 << 20, 0, 2}} {
		t.Run(fmt.Sprintf("budget=%d,size=%d,page=%d,cluster=%d,tasks=%d", c.budget, c.size, c.ps, c.cluster, c.tasks), func(t *testing.T) {
			v := newVM(t, c.budget)
			v.SetDefaultManager(&shelf{})
			o := newObject(t, v, ObjectOptions{Size: c.size, PageSize: c.ps, ClusterSize: c.cluster})
			ctx, cancel := context.WithCancel(context.Background())
			var pushers, wg sync.WaitGroup
			for i := range 2 {
				pushers.Go(func() {
					rng := rand.New(rand.NewPCG(seed, uint64(i)))
					for ctx.Err() == nil {
						off := rng.Int64N(o.Size())
						n := min(o.Size()-off, 1+rng.Int64N(1<<rng.IntN(22)))
						if err := o.PageOut(ctx, off, n); err != nil && ctx.Err() == nil {
							t.Error(err)
						}
						if used, err := v.frames.Usage(); err != nil || used > c.budget {
							t.Errorf("%d bytes in use, budget %d, %v", used, c.budget, err)
						}
					}
				})
			}
			for i := range c.tasks {
				x := startTask(t, v)
				m := x.mapObject(o, 1, 0, o.Size(), false)
				wg.Go(func() {
					r := x.do(order{Op: "stress", ID: 1, N: o.Size(), Seconds: 2, Seed: seed, Slot: i, Slots: c.tasks, Threads: 3}, nil)
					if r.Wrong > 0 {
						t.Errorf("%d wrong values", r.Wrong)
					}
					t.Logf("%d operations, %+v", r.Ops, m.Stats())
				})
			}
			wg.Wait()
			cancel()
			pushers.Wait()
		})
	}
}
