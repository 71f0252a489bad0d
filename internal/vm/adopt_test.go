package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/arena"
	"machpager/internal/frames"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// estate is what a pager leaves when it is killed: the mount, and for each object its table and its file. The test holds them, as a guardian does.
type estate struct {
	pool *frames.Pool // the dead pager's; of its counts nobody believes anything
	objs []*relic
}

type relic struct {
	opt   AdoptOptions
	table *arena.Arena
	file  *frames.File
}

func newEstate(t testing.TB, kind frames.Kind, budget int64) *estate {
	t.Helper()
	pool, err := frames.Open(frames.Options{Budget: budget, Kind: kind})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pool.Close() })
	return &estate{pool: pool}
}

// add makes an object that nobody has served so far.
func (e *estate) add(t testing.TB, opt ObjectOptions) *relic {
	t.Helper()
	ps := int64(max(opt.PageSize, 4096))
	size := (opt.Size + ps - 1) &^ (ps - 1)
	a, err := arena.Create("pages", "test", 1, size/ps*8)
	if err == nil {
		err = a.Grow(size / ps * 8)
	}
	if err != nil {
		t.Fatal(err)
	}
	f, err := e.pool.NewFile(size)
	if err != nil {
		t.Fatal(err)
	}
	r := &relic{opt: AdoptOptions{ObjectOptions: opt, ID: uint64(len(e.objs) + 1), Length: size}, table: a, file: f}
	t.Cleanup(func() { a.Close(); f.Close() })
	e.objs = append(e.objs, r)
	return r
}

func dup(t testing.TB, fd int) *os.File {
	t.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(n), "kept")
}

// heir is a new vm on the estate, that adopts; the test adopts its objects.
func (e *estate) heir(t testing.TB, budget int64, log io.Writer) *VM {
	t.Helper()
	s := e.pool.State()
	var mount *os.File
	if e.pool.Mount() >= 0 {
		mount = dup(t, e.pool.Mount())
	}
	pool, err := frames.Open(frames.Options{Budget: budget, Adopt: &s, Mount: mount})
	if err != nil {
		t.Fatal(err)
	}
	v, err := New(Options{Frames: pool, Adopting: true, Log: slog.New(slog.NewTextHandler(log, nil)), NewTable: func(uint64, int64) (Table, error) { return nil, errors.New("no new ones") }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		v.Close()
		if n := pool.Reserved(); n != 0 {
			t.Errorf("%d frames still reserved after the end", n)
		}
		pool.Close()
	})
	return v
}

// adopt hands the object to v.
func (r *relic) adopt(t testing.TB, v *VM) (*Object, Adopted) {
	t.Helper()
	opt := r.opt
	var err error
	if opt.Table, err = arena.Open(dup(t, int(r.table.File().Fd())), "test", 1, r.table.Size()); err != nil {
		t.Fatal(err)
	}
	if opt.File, err = v.frames.AdoptFile(dup(t, r.file.Fd()), r.file.Size()); err != nil {
		t.Fatal(err)
	}
	o, a, err := v.AdoptObject(opt)
	if err != nil {
		t.Fatal(err)
	}
	return o, a
}

// Every word there can be, in any order, with something in the file or nothing under what is not resident: what is adopted is what package page says, word by word, and the frames
// add up.
func TestAdoptEveryWord(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, kind := range []frames.Kind{frames.Tmpfs, frames.Memfd} {
		for _, ps := range []int64{4096, 65536} {
			t.Run(fmt.Sprintf("%v,page=%d", kind, ps), func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, uint64(ps)))
				const pages, budget = 1024, 256 << 20
				e := newEstate(t, kind, budget)
				shelf := &shelf{}
				r := e.add(t, ObjectOptions{Size: pages * ps, PageSize: int(ps), Manager: shelf, Port: emm.NewPort()})
				words, before := r.table.Words(), make([]page.Word, pages)
				written := make([]bool, pages)
				resident, dirty := int64(0), int64(0)
				for p := int64(0); p < pages; {
					w := page.Word(rng.IntN(int(page.NumStates)))
					for range 1 + rng.IntN(20) {
						if p == pages {
							break
						}
						for _, b := range []page.Word{page.BusyBit, page.WaitersBit, page.Precious, page.Failure, given, recent, 3 << 16} {
							if rng.IntN(3) == 0 {
								w |= b
							}
						}
						words[p].Store(uint64(w))
						before[p] = w
						now, _ := page.Adopt(w)
						if written[p] = now.Resident() || rng.IntN(4) > 0; written[p] {
							if _, err := r.file.WriteAt(bytes.Repeat([]byte{byte(p)}, int(ps)), p*ps); err != nil {
								t.Fatal(err)
							}
						}
						if now.Resident() {
							resident++
							if now.State() == page.Dirty {
								dirty++
							}
						}
						p++
					}
				}
				v := e.heir(t, budget, testLog{t})
				o, a := r.adopt(t, v)
				if a.Resident != resident || a.Dirty != dirty || a.Stuck != 0 {
					t.Errorf("%+v, want %d resident, %d dirty, none stuck", a, resident, dirty)
				}
				if n := v.frames.Reserved(); n != resident*ps/4096 || o.resident.Load() != n {
					t.Errorf("%d frames reserved, %d of the object, want %d", n, o.resident.Load(), resident*ps/4096)
				}
				buf := make([]byte, ps)
				for p := range int64(pages) {
					want, _ := page.Adopt(before[p])
					if got := o.word(p); got != want {
						t.Fatalf("page %d: %v became %v, want %v", p, before[p], got, want)
					}
					there, err := o.file.Occupied(p*ps, ps)
					if err != nil {
						t.Fatal(err)
					}
					if err := o.file.ReadAt(buf, p*ps); err != nil {
						t.Fatal(err)
					}
					switch {
					case want.Resident() && written[p]:
						if there != ps || !bytes.Equal(buf, bytes.Repeat([]byte{byte(p)}, int(ps))) {
							t.Fatalf("page %d, %v: its contents are gone", p, before[p])
						}
					case !want.Resident() && there != 0:
						t.Fatalf("page %d, %v: %d bytes lie in the file under %v", p, before[p], there, want)
					}
				}
				// Adopting once more is the same: a pager may die while it adopts.
				w := e.heir(t, budget, testLog{t})
				if _, b := r.adopt(t, w); b.Resident != a.Resident || b.Dirty != a.Dirty || b.Punched != 0 {
					t.Errorf("adopted again: %+v, the first time %+v", b, a)
				}
				v.Resume()
				for end := time.Now().Add(5 * time.Second); v.policy.Stats().Filled != resident*ps/4096; time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatalf("the policy has heard of %d frames, want %d", v.policy.Stats().Filled, resident*ps/4096)
					}
				}
				if next := newTestObject(t, v); next.ID() <= o.ID() {
					t.Errorf("the next object is %d, behind %d", next.ID(), o.ID())
				}
			})
		}
	}
}

// newTestObject has a table that nobody keeps.
func newTestObject(t testing.TB, v *VM) *Object {
	t.Helper()
	v.newTable = func(_ uint64, n int64) (Table, error) {
		a, err := arena.Create("pages", "test", 1, n)
		if err == nil {
			err = a.Grow(n)
		}
		return a, err
	}
	o, err := v.NewObject(ObjectOptions{Size: 4096})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// Before Resume nothing answers and nothing goes out; afterwards the waiting thread gets its page though its message was lost, what is wired stays, and what was in Error heals.
func TestAdoptMappingAndResume(t *testing.T) {
	const budget = 4 << 20
	e := newEstate(t, frames.Auto, budget)
	s := &shelf{pages: map[int64][]byte{}, size: 4096}
	r := e.add(t, ObjectOptions{Size: 2 << 20, Manager: &keeps{s}, Port: emm.NewPort()})
	words := r.table.Words()
	for p := range 256 {
		words[p].Store(uint64(page.Dirty))
		if _, err := r.file.WriteAt(bytes.Repeat([]byte{byte(p + 1)}, 4096), int64(p)*4096); err != nil {
			t.Fatal(err)
		}
		r.file.Punch(int64(p+1)*4096, 2<<20-int64(p+1)*4096) // a write may take a whole folio
	}
	words[300].Store(uint64(page.Word(page.Requested) | page.WaitersBit))
	words[301].Store(uint64(page.Error))
	s.pages[300*4096] = bytes.Repeat([]byte{77}, 4096)
	s.pages[301*4096] = bytes.Repeat([]byte{78}, 4096)

	x, fd := spawnTask(t)
	f, err := r.file.Dup()
	if err != nil {
		t.Fatal(err)
	}
	addr := x.do(order{Op: "map", ID: 1, N: 2 << 20}, f).Addr
	f.Close()
	got := make(chan []byte, 1)
	go func() { got <- x.read(1, 300*4096, 1) }()
	// The old pager reads the message, and dies.
	old := uffdFrom(fd)
	waitReadable(t, fd)
	lost := make([]uffdMsg, 8)
	if n, err := old.Read(lost); n != 1 || err != nil {
		t.Fatalf("%d messages, %v", n, err)
	}

	v := e.heir(t, budget, testLog{t})
	o, a := r.adopt(t, v)
	if a != (Adopted{Resident: 256, Dirty: 256, Errors: 1, Punched: 1}) {
		t.Errorf("%+v", a)
	}
	tk, err := v.NewTask(old, x.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	x.Task = tk
	for _, bad := range [][]Span{{{addr + 1, 0, 4096}}, {{addr, 4096, 2 << 20}}, {{0, 0, 4096}}, {{addr, 0, 8192}, {addr + 4096, 4096, 4096}}} {
		if _, err := tk.AdoptMapping(o, 9, 0, 2<<20, false, bad); err == nil {
			t.Errorf("adopted at %+v", bad)
		}
	}
	m, err := tk.AdoptMapping(o, 41, 0, 2<<20, false, []Span{{addr, 0, 2 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.AdoptWire(0, 16*4096); err != nil {
		t.Fatal(err)
	}
	if n := v.wired.Load(); n != 16 {
		t.Errorf("%d frames wired", n)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := o.PageOut(ctx, 0, o.Size()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("page-out while adopting: %v", err)
	}
	if err := o.Discard(ctx, 0, o.Size()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("discard while adopting: %v", err)
	}
	if len(s.pages) != 2 {
		t.Error("something went out while adopting")
	}
	select {
	case b := <-got:
		t.Errorf("%v was answered while adopting", b)
	default:
	}
	v.Resume()
	v.Resume()
	select {
	case b := <-got:
		if !bytes.Equal(b, []byte{77}) {
			t.Errorf("%v", b)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the thread whose message was lost still waits")
	}
	if b := x.read(1, 301*4096, 1); b != nil && !bytes.Equal(b, []byte{78}) {
		t.Errorf("a page that was in Error: %v", b)
	}
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	if n, _ := o.file.Occupied(0, o.size); n != 16*4096 {
		t.Errorf("%d bytes are resident, want what is wired", n)
	}
	for p := range int64(256) {
		if b := x.read(1, p*4096, 4096); !bytes.Equal(b, bytes.Repeat([]byte{byte(p + 1)}, 4096)) {
			t.Fatalf("page %d is wrong", p)
		}
	}
	if err := m.Unwire(0, 16*4096); err != nil {
		t.Error(err)
	}
	if _, _, err := v.AdoptObject(AdoptOptions{}); !errors.Is(err, emm.InvalidArgument) {
		t.Errorf("adopted after Resume: %v", err)
	}
	if m2, f, err := tk.NewMapping(o, 0, 4096, false); err != nil {
		t.Error(err)
	} else if f.Close(); m2.ID() <= 41 {
		t.Errorf("the next mapping is %d", m2.ID())
	}
}

// keeps is a shelf that has its pages before Init.
type keeps struct{ *shelf }

func (k *keeps) Init(h emm.Head, _ int) emm.KernReturn {
	return h.Control.ChangeAttributes(emm.Attributes{}, false)
}

// An object whose manager is lost is an error, not zeros; an orphan ends while others are adopted; a damaged table is refused.
func TestAdoptWhatIsLost(t *testing.T) {
	e := newEstate(t, frames.Auto, 16<<20)
	refused := e.add(t, ObjectOptions{Size: 1 << 20, Manager: &refuses{}, Port: emm.NewPort()})
	orphan := e.add(t, ObjectOptions{Size: 1 << 20, Manager: &keeps{&shelf{pages: map[int64][]byte{}, size: 4096}}, Port: emm.NewPort()})
	damaged := e.add(t, ObjectOptions{Size: 1 << 20})
	for _, r := range e.objs {
		r.table.Words()[3].Store(uint64(page.Dirty))
	}
	damaged.table.Words()[4].Store(7)
	v := e.heir(t, 16<<20, testLog{t})
	o, _ := refused.adopt(t, v)
	if !o.control.destroyed.Load() {
		t.Error("not destroyed")
	}
	p, _ := orphan.adopt(t, v)
	ends(t, 5*time.Second, "Terminate", p.Terminate)
	if s := orphan.opt.Manager.(*keeps).shelf; len(s.pages) != 1 {
		t.Errorf("%d pages of the orphan were returned", len(s.pages))
	}
	tbl, err := arena.Open(dup(t, int(damaged.table.File().Fd())), "test", 1, damaged.table.Size())
	if err != nil {
		t.Fatal(err)
	}
	defer tbl.Close()
	file, err := v.frames.AdoptFile(dup(t, damaged.file.Fd()), damaged.file.Size())
	if err != nil {
		t.Fatal(err)
	}
	opt := damaged.opt
	opt.Table, opt.File = tbl, file
	if _, _, err := v.AdoptObject(opt); !errors.Is(err, emm.InvalidArgument) {
		t.Errorf("a damaged table: %v", err)
	}
	file.Close()
	x, fd := spawnTask(t)
	if x.Task, err = v.NewTask(uffdFrom(fd), x.cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	f, err := refused.file.Dup()
	if err != nil {
		t.Fatal(err)
	}
	addr := x.do(order{Op: "map", ID: 1, N: 1 << 20}, f).Addr
	f.Close()
	if _, err := x.AdoptMapping(o, 5, 0, 1<<20, false, []Span{{addr, 0, 1 << 20}}); err != nil {
		t.Fatal(err)
	}
	v.Resume()
	if b := x.read(1, 3*4096, 1); b != nil {
		t.Errorf("%v of an object whose manager is lost", b)
	}
}

type refuses struct{ shelf }

func (*refuses) Init(emm.Head, int) emm.KernReturn { return emm.Failure }

// BenchmarkAdopt is one object of 1 GiB, all of it resident and dirty, in one run and in every second page.
func BenchmarkAdopt(b *testing.B) {
	for _, step := range []int{1, 2} {
		b.Run(fmt.Sprintf("every=%d", step), func(b *testing.B) {
			e := newEstate(b, frames.Auto, 2<<30)
			r := e.add(b, ObjectOptions{Size: int64(step) << 30, Manager: &keeps{&shelf{}}, Port: emm.NewPort()})
			words := r.table.Words()
			data := bytes.Repeat([]byte{1}, 2<<20)
			for off := int64(0); off < r.file.Size(); off += 2 << 20 {
				if step == 1 {
					r.file.WriteAt(data, off)
				}
				for p := off / 4096; p < (off+2<<20)/4096; p += int64(step) {
					words[p].Store(uint64(page.Dirty))
				}
			}
			b.ResetTimer()
			for range b.N {
				b.StopTimer()
				v := e.heir(b, 2<<30, io.Discard)
				var tbl *arena.Arena
				tbl, _ = arena.Open(dup(b, int(r.table.File().Fd())), "test", 1, r.table.Size())
				file, _ := v.frames.AdoptFile(dup(b, r.file.Fd()), r.file.Size())
				opt := r.opt
				opt.Table, opt.File = tbl, file
				b.StartTimer()
				o, a, err := v.AdoptObject(opt)
				if err != nil || a.Resident != 1<<30/4096 {
					b.Fatal(a, err)
				}
				v.Resume()
				b.StopTimer()
				// Its end would punch all of it.
				v.frames.Release(int(o.resident.Swap(0)))
				v.mu.Lock()
				delete(v.objects, o.id)
				v.mu.Unlock()
				tbl.Close()
				b.StartTimer()
			}
		})
	}
}
