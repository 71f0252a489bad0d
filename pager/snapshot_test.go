package pager

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

// stores are what snapshots are tested on.
var stores = map[string]func(testing.TB) store.Store{
	"memory": func(t testing.TB) store.Store { return memoryStore(t, nil) },
	"file":   func(t testing.TB) store.Store { return fileStore(t) },
	"slow": func(t testing.TB) store.Store {
		f := storetest.NewFaulty(memoryStore(t, nil))
		f.Inject(storetest.Fault{Label: "slow", On: storetest.OnRead | storetest.OnWrite, Delay: 50 * time.Microsecond})
		return f
	},
}

// checkEmpty closes a pager whose objects have ended, and looks for what is left.
func checkEmpty(t testing.TB, p *Pager, s store.Store) {
	t.Helper()
	for deadline := time.Now().Add(emmtest.Deadline); len(p.Objects()) > 0 || p.Info().Used > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("after the end of all objects: %+v, %d bytes used", p.Objects(), p.Info().Used)
			break
		}
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if n := p.shares.count(); n != 0 || len(p.shares.groups) != 0 {
		t.Errorf("%d slots and %d groups have shares after the end", n, len(p.shares.groups))
	}
	if used := s.Info().Used; used != 0 {
		t.Errorf("%d bytes leaked", used)
	}
}

// vm is a kernel and its object's port.
type vm struct {
	*emmtest.Kernel
	port emm.Port
}

// vmOf attaches a vm to an object that is there.
func vmOf(t emmtest.TB, p *Pager, port emm.Port, pageSize int) vm {
	k := vm{emmtest.NewKernel(t, p, port, pageSize), port}
	if kr := k.Init(); kr != emm.Success {
		t.Fatalf("Init: %v", kr)
	}
	return k
}

// snapshot makes a snapshot and attaches a vm to it.
func (k vm) snapshot(t emmtest.TB, p *Pager, pageSize int) vm {
	c := vm{port: emm.NewPort()}
	c.Kernel = emmtest.NewKernel(t, p, c.port, pageSize)
	c.Inherit(k.Kernel)
	if err := p.Snapshot(k.port, c.port); err != nil {
		t.Fatalf("%v", err)
	}
	if kr := c.Init(); kr != emm.Success {
		t.Fatalf("Init of a snapshot: %v", kr)
	}
	return c
}

// end ends the object, and waits for its loans.
func (k vm) end(p *Pager, loans ...*emmtest.Loan) {
	k.Terminate()
	p.NoSenders(k.port)
	for _, l := range loans {
		l.Wait()
	}
	k.Check()
}

func TestSnapshot(t *testing.T) {
	for name, open := range stores {
		for _, pageSize := range []int{4096, 64 << 10, 2 << 20} {
			for _, temporary := range []bool{false, true} {
				if pageSize == 2<<20 && (temporary || name == "slow" || raceEnabled) {
					continue // nothing new, and long
				}
				t.Run(fmt.Sprintf("%s/%d/%v", name, pageSize, temporary), func(t *testing.T) { testSnapshot(t, open(t), int64(pageSize), temporary) })
			}
		}
	}
}

func testSnapshot(t *testing.T, s store.Store, pageSize int64, temporary bool) {
	p := newPager(t, s)
	var k vm
	if k.port = emm.NewPort(); temporary {
		k.Kernel = emmtest.NewKernel(t, p, k.port, int(pageSize))
		if kr := k.Create(emm.NewPort(), 16*pageSize); kr != emm.Success {
			t.Fatal(kr)
		}
	} else if err := p.ObjectCreate(k.port, 16*pageSize, int(pageSize)); err != nil {
		t.Fatal(err)
	} else {
		k = vmOf(t, p, k.port, int(pageSize))
	}
	used := func(want int64, when string) {
		t.Helper()
		for deadline := time.Now().Add(emmtest.Deadline); p.Info().Used != want*pageSize; time.Sleep(time.Millisecond) { // a reader may be leaving
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d pages used, want %d", when, p.Info().Used/pageSize, want)
			}
		}
	}
	all := emm.Run{Size: 16 * pageSize}
	k.Write(0, emmtest.Fill(8, pageSize, 1))
	a := k.snapshot(t, p, int(pageSize))
	used(8, "snapshot")
	k.Read(all)
	a.Read(all)
	k.Write(0, emmtest.Fill(4, pageSize, 2))
	a.Write(2*pageSize, emmtest.Fill(4, pageSize, 3))
	used(14, "both written") // 4 and 4 of their own, 2 left over for each, 2 shared
	b := a.snapshot(t, p, int(pageSize))
	c := b.snapshot(t, p, int(pageSize))
	used(14, "snapshot of a snapshot of a snapshot")
	for _, x := range []vm{k, a, b, c} {
		x.Read(all)
	}
	a.Write(0, make([]byte, 8*pageSize)) // b and c have them
	used(14, "the middle one is zeros")
	b.end(p)
	used(14, "an end")
	k.end(p)
	used(8, "the first one's end")
	for _, x := range []vm{a, c} {
		x.Read(all)
		x.end(p)
	}
	checkEmpty(t, p, s)
}

func TestSnapshotErrors(t *testing.T) {
	s := memoryStore(t, nil)
	p := newPager(t, s)
	k, port := attach(t, p, 8, ps)
	_, other := attach(t, p, 8, ps)
	for _, c := range []struct{ source, copy emm.Port }{{emm.NewPort(), emm.NewPort()}, {port, other}, {port, port}, {port, emm.Port{}}, {emm.Port{}, emm.NewPort()}} {
		if err := p.Snapshot(c.source, c.copy); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("bad ports: %v", err)
		}
	}
	k.Write(0, emmtest.Fill(8, ps, 1))
	p.hook = func(step string) { // the port is taken while the map is copied
		if step == "snapshot.copied" {
			if err := p.ObjectCreate(emm.Port{1}, ps, ps); err != nil {
				t.Error(err)
			}
		}
	}
	if err := p.Snapshot(port, emm.Port{1}); !errors.Is(err, emm.InvalidArgument) {
		t.Errorf("a port that is taken meanwhile: %v", err)
	}
	if n := p.shares.count(); n != 0 {
		t.Errorf("%d shares left by a snapshot that failed", n)
	}
	p.hook = nil
	k.Read(run(0, 8))
	if got := len(p.Objects()); got != 3 {
		t.Errorf("%d objects, want 3", got)
	}

	failing := errors.New("no memory")
	var fail error
	q, err := New(Options{Store: memoryStore(t, nil), NewMemory: func(name string) (store.Memory, error) {
		if fail != nil {
			return nil, fail
		}
		return store.NewAnonymous(0)
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	_, port = attach(t, q, 8, ps)
	fail = failing
	if err := q.Snapshot(port, emm.NewPort()); !errors.Is(err, emm.ResourceShortage) || !errors.Is(err, failing) {
		t.Errorf("without memory for the map: %v", err)
	}
	fail = nil
	if err := q.Snapshot(port, emm.NewPort()); err != nil {
		t.Error(err)
	}
	q.Close()
	if err := q.Snapshot(port, emm.NewPort()); err == nil {
		t.Error("a snapshot after Close")
	}
}

// Histories of returns, requests, snapshots and ends of many objects, against the model of each.
func TestSnapshotHistories(t *testing.T) {
	boom := errors.New("boom")
	open := map[string]func(testing.TB) store.Store{"faulty": func(t testing.TB) store.Store {
		f := storetest.NewFaulty(memoryStore(t, nil))
		var mu sync.Mutex
		n := 0
		seventh := func(store.Slot, int) bool { mu.Lock(); defer mu.Unlock(); n++; return n%7 == 0 }
		f.Inject(storetest.Fault{Label: "write", On: storetest.OnWrite, Match: seventh, Err: boom})
		f.Inject(storetest.Fault{Label: "full", On: storetest.OnAlloc, Match: seventh, Err: store.ErrNoSpace})
		f.Inject(storetest.Fault{Label: "read", On: storetest.OnRead, Match: seventh, Err: boom})
		f.Inject(storetest.Fault{Label: "slow", On: storetest.OnWrite, Match: seventh, Delay: 20 * time.Microsecond})
		return f
	}}
	for name, o := range stores {
		open[name] = o
	}
	for name, open := range open {
		for _, pageSize := range []int{4096, 16384} {
			t.Run(fmt.Sprint(name, "/", pageSize), func(t *testing.T) {
				rapid.Check(t, func(rt *rapid.T) {
					s := open(t)
					p := newPager(t, s)
					h := &snapshots{p: p, pageSize: pageSize, mayFail: name == "faulty"}
					rt.Repeat(map[string]func(*rapid.T){
						"create":   h.create,
						"return":   h.give,
						"request":  h.ask,
						"wait":     h.wait,
						"snapshot": h.snapshot,
						"end":      h.end,
					})
					h.wait(rt)
					for len(h.live) > 0 {
						h.live[0].Read(emm.Run{Size: h.live[0].pages * int64(pageSize)})
						h.end(rt)
					}
					checkEmpty(t, p, s)
					s.Close()
				})
			})
		}
	}
}

// snapshots is a history.
type snapshots struct {
	p        *Pager
	pageSize int
	mayFail  bool
	live     []*subject
	seed     uint64
}

// subject is an object in a history. Pages are in at most one message.
type subject struct {
	vm
	pages    int64
	loans    map[int64]*emmtest.Loan
	requests map[int64]*emmtest.Request
}

func (h *snapshots) add(k vm, pages int64) {
	k.MayFail = h.mayFail
	h.live = append(h.live, &subject{k, pages, make(map[int64]*emmtest.Loan), make(map[int64]*emmtest.Request)})
}

func (h *snapshots) create(t *rapid.T) {
	if len(h.live) > 6 {
		return
	}
	k := vm{port: emm.NewPort()}
	pages := rapid.SampledFrom([]int64{16, 16, 3 * chunkPages}).Draw(t, "size")
	if rapid.Bool().Draw(t, "temporary") {
		k.Kernel = emmtest.NewKernel(t, h.p, k.port, h.pageSize)
		k.Create(emm.NewPort(), pages*int64(h.pageSize))
	} else if err := h.p.ObjectCreate(k.port, pages*int64(h.pageSize), h.pageSize); err != nil {
		t.Fatal(err)
	} else {
		k = vmOf(t, h.p, k.port, h.pageSize)
	}
	h.add(k, pages)
}

// draw draws an object, and a run of its pages that nothing is outstanding for.
func (h *snapshots) draw(t *rapid.T) (x *subject, page, n int64) {
	if len(h.live) == 0 {
		return nil, 0, 0
	}
	x = rapid.SampledFrom(h.live).Draw(t, "object")
	page = rapid.Int64Range(0, 7).Draw(t, "page")
	if x.pages > 16 {
		page += rapid.SampledFrom([]int64{0, chunkPages - 8, 2*chunkPages - 4}).Draw(t, "chunk")
	}
	most := rapid.Int64Range(1, 8).Draw(t, "pages")
	for n < most {
		l, r := x.loans[page+n], x.requests[page+n]
		if l != nil && !l.Done() || r != nil && !r.Done() {
			break
		}
		n++
	}
	return x, page, n
}

func (h *snapshots) give(t *rapid.T) {
	x, page, n := h.draw(t)
	if n == 0 {
		return
	}
	h.seed++
	data := emmtest.Fill(int(n), int64(h.pageSize), h.seed)
	if rapid.IntRange(0, 2).Draw(t, "zeros") == 0 {
		clear(data[:h.pageSize])
	}
	l := x.Give(page*int64(h.pageSize), data, false)
	for i := range n {
		x.loans[page+i] = l
	}
}

func (h *snapshots) ask(t *rapid.T) {
	x, page, n := h.draw(t)
	if n == 0 {
		return
	}
	r := x.Ask(emm.Run{Off: page * int64(h.pageSize), Size: n * int64(h.pageSize)}, page*int64(h.pageSize))
	for i := range n {
		x.requests[page+i] = r
	}
}

func (h *snapshots) wait(*rapid.T) {
	for _, x := range h.live {
		for _, l := range x.loans {
			l.Wait()
		}
		for _, r := range x.requests {
			r.Wait()
		}
	}
}

func (h *snapshots) snapshot(t *rapid.T) {
	if len(h.live) == 0 || len(h.live) > 10 {
		return
	}
	x := rapid.SampledFrom(h.live).Draw(t, "source")
	h.add(x.vm.snapshot(t, h.p, h.pageSize), x.pages)
}

func (h *snapshots) end(t *rapid.T) {
	if len(h.live) == 0 {
		return
	}
	i := rapid.IntRange(0, len(h.live)-1).Draw(t, "ended")
	x := h.live[i]
	h.live = append(h.live[:i], h.live[i+1:]...)
	if rapid.Bool().Draw(t, "order") {
		h.p.NoSenders(x.port)
	}
	x.vm.end(h.p, slices.Collect(maps.Values(x.loans))...)
}

// A snapshot is of one instant: pages written one after the other, each when the one before is stored, far apart in the map, while its map is copied.
func TestSnapshotIsOneInstant(t *testing.T) {
	const pages, apart = 40, chunkPages * copyBatch / 4
	s := memoryStore(t, nil)
	p := newPager(t, s)
	k, port := attach(t, p, pages*apart, ps)
	k.MayFail = true // the model is not asked
	version := uint64(0)
	write := func() { // the next page of this round, or the first of the next
		page := int64(version % pages)
		if kr := k.Write(page*apart*ps, contents(version/pages+1, int(page))); kr != emm.Success {
			t.Fatal(kr)
		}
		version++
	}
	for range pages + 7 {
		write()
	}
	steps := 0
	p.hook = func(step string) { // on the goroutine of Snapshot, without locks: as others would
		if step != "snapshot.batch" {
			return
		}
		steps++
		for range steps % 13 {
			write()
		}
	}
	for range 20 {
		at := version
		c := emm.NewPort()
		if err := p.Snapshot(port, c); err != nil {
			t.Fatal(err)
		}
		if version == at {
			t.Fatal("nothing was written meanwhile")
		}
		ck := emmtest.NewKernel(t, p, c, ps)
		ck.Init()
		for page, got := range readPages(t, p, ck, c, pages, apart) {
			want := at / pages
			if uint64(page) < at%pages {
				want++
			}
			if !bytes.Equal(got, contents(want, page)) {
				t.Fatalf("snapshot at %d: page %d is of another time", at, page)
			}
		}
		p.NoSenders(c)
	}
	k.Terminate()
	p.NoSenders(port)
	checkEmpty(t, p, s)
}

// readPages reads pages that are so far apart, and terminates k.
func readPages(t testing.TB, p *Pager, k *emmtest.Kernel, port emm.Port, n, apart int64) [][]byte {
	t.Helper()
	k.Terminate()
	c := &collector{Kernel: k, pages: make(map[int64][]byte)}
	h := emm.Head{Object: port, Control: c}
	if kr := p.Init(h, ps); kr != emm.Success {
		t.Fatalf("Init: %v", kr)
	}
	b := make([][]byte, n)
	for i := range n {
		p.DataRequest(h, run(i*apart, 1), i*apart*ps, emm.ProtRead)
		b[i] = c.pages[i*apart]
	}
	p.Terminate(h)
	if len(c.bad) > 0 || len(c.pages) != int(n) {
		t.Fatalf("%d of %d pages answered, errors for %v", len(c.pages), n, c.bad)
	}
	return b
}

// Ends of all kinds at each step of a snapshot.
func TestSnapshotAndEnds(t *testing.T) {
	for _, step := range []string{"snapshot.reserved", "snapshot.batch", "snapshot.copied", "snapshot.published"} {
		for _, what := range []string{"source", "temporary source", "source and copy", "close"} {
			t.Run(step+"/"+what, func(t *testing.T) {
				s := memoryStore(t, nil)
				p := newPager(t, s)
				k := vm{port: emm.NewPort()}
				const size = 2 * copyBatch * chunkPages * ps
				if what == "temporary source" {
					k.Kernel = emmtest.NewKernel(t, p, k.port, ps)
					k.Create(emm.NewPort(), size)
				} else if err := p.ObjectCreate(k.port, size, ps); err != nil {
					t.Fatal(err)
				} else {
					k = vmOf(t, p, k.port, ps)
				}
				for i := range int64(2 * copyBatch) {
					k.Write(i*chunkPages*ps, emmtest.Fill(3, ps, uint64(i)))
				}
				c := vm{port: emm.NewPort()}
				c.Kernel = emmtest.NewKernel(t, p, c.port, ps)
				c.Inherit(k.Kernel)
				var closing sync.WaitGroup
				hit := false
				p.hook = func(now string) {
					if now != step || hit {
						return
					}
					hit = true
					if what == "close" {
						closing.Go(func() { p.Close() })
						for deadline := time.Now().Add(emmtest.Deadline); p.lookup(k.port) != nil; time.Sleep(time.Millisecond) {
							if time.Now().After(deadline) {
								t.Error("Close did not begin")
								return
							}
						}
						return
					}
					k.end(p)
					if what == "source and copy" {
						p.NoSenders(c.port)
					}
				}
				err := p.Snapshot(k.port, c.port)
				closing.Wait()
				switch {
				case !hit:
					t.Fatal("no such step")
				case what == "close":
					if (err == nil) != (step == "snapshot.published") {
						t.Errorf("Close at step %q: %v", step, err)
					}
				case err != nil:
					t.Error(err)
				case what != "source and copy" || step != "snapshot.published":
					if kr := c.Init(); kr != emm.Success {
						t.Fatal(kr)
					}
					for i := range int64(2 * copyBatch) {
						c.Read(run(i*chunkPages, 4))
					}
					c.end(p)
				}
				if what != "close" {
					checkEmpty(t, p, s)
				}
				if used := s.Info().Used; used != 0 || p.shares.count() != 0 {
					t.Errorf("%d bytes, %d shares left", used, p.shares.count())
				}
			})
		}
	}
}

// The pager is killed at each step of a history of returns, snapshots and ends, and restarted. A snapshot is there with all its contents or not at all; objects that
// share slots share them again; no slot is lost, or freed while a map names it; and no map is left over.
func TestSnapshotKilled(t *testing.T) {
	const pages = 24
	type model struct {
		last, now [pages]uint64
		pageless  bool // its end or its beginning is under way
	}
	type state struct {
		w       *world
		step    string
		objects map[emm.Port]model
	}
	w := newWorld()
	p, f := w.boot(t)
	var states []state
	objects := map[emm.Port]model{}
	record := func(step string) {
		now := make(map[emm.Port]model)
		for port, m := range objects {
			now[port] = m
		}
		states = append(states, state{w.copy(t), step, now})
	}
	k, port := attach(t, p, pages, ps)
	objects[port] = model{}
	kernels := map[emm.Port]*emmtest.Kernel{port: k}
	f.Step(record)
	p.hook = record
	version := uint64(0)
	write := func(port emm.Port, first, n int) {
		version++
		m := objects[port]
		data := make([]byte, 0, n*ps)
		for i := first; i < first+n; i++ {
			if m.now[i] = version; (version+uint64(i))%5 == 0 {
				m.now[i] = 0
			}
			data = append(data, contents(m.now[i], i)...)
		}
		objects[port] = m
		if kr := kernels[port].Write(int64(first)*ps, data); kr != emm.Success {
			t.Fatal(kr)
		}
		m.last = m.now
		objects[port] = m
	}
	snapshot := func(of emm.Port) emm.Port {
		c := emm.NewPort()
		m := objects[of]
		m.pageless = true
		objects[c] = m
		if err := p.Snapshot(of, c); err != nil {
			t.Fatal(err)
		}
		m.pageless = false
		objects[c] = m
		ck := emmtest.NewKernel(t, p, c, ps)
		ck.Inherit(kernels[of])
		if kr := ck.Init(); kr != emm.Success {
			t.Fatal(kr)
		}
		kernels[c] = ck
		record("snapshot made")
		return c
	}
	end := func(port emm.Port) {
		m := objects[port]
		m.pageless = true
		objects[port] = m
		kernels[port].Terminate()
		p.NoSenders(port)
		for deadline := time.Now().Add(emmtest.Deadline); ; time.Sleep(100 * time.Microsecond) { // its release has steps too
			p.mu.Lock()
			n := 0
			for _, o := range p.ids {
				if o != nil {
					n++
				}
			}
			p.mu.Unlock()
			if n < len(objects) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("an object is not released")
			}
		}
		delete(objects, port)
		record("ended")
	}
	write(port, 0, 9)
	a := snapshot(port)
	write(port, 4, 7)
	write(a, 2, 3)
	b := snapshot(a)
	write(b, 0, 24)
	write(a, 7, 2)
	end(a)
	c := snapshot(b)
	end(port)
	write(c, 3, 12)
	end(b)
	f.Step(nil)
	p.hook = nil
	kernels[c].Read(run(0, pages))

	seen := map[string]bool{}
	for i, s := range states {
		seen[s.step] = true
		p, f := s.w.boot(t)
		distinct := map[string]bool{}
		for port, m := range s.objects {
			if p.lookup(port) == nil {
				if !m.pageless {
					t.Errorf("killed at step %d (%s): an object is lost", i, s.step)
				}
				continue
			}
			k := emmtest.NewKernel(t, p, port, ps)
			if kr := k.Init(); kr != emm.Success {
				t.Fatal(kr)
			}
			for page, got := range readRaw(t, p, k, port, pages) {
				if !bytes.Equal(got, contents(m.last[page], page)) && !bytes.Equal(got, contents(m.now[page], page)) {
					t.Errorf("killed at step %d (%s): page %d is neither version %d nor %d", i, s.step, page, m.last[page], m.now[page])
				}
				distinct[string(got)] = true
			}
		}
		delete(distinct, string(make([]byte, ps)))
		if used := f.Info().Used / ps; used != int64(len(distinct)) {
			t.Errorf("killed at step %d (%s): %d slots used for %d different pages", i, s.step, used, len(distinct))
		}
		// Sharing goes on: what one overwrites or ends, others keep.
		var left []emm.Port
		for port := range s.objects {
			if p.lookup(port) != nil {
				left = append(left, port)
			}
		}
		for len(left) > 0 {
			k := emmtest.NewKernel(t, p, left[0], ps)
			k.Init()
			k.Write(0, emmtest.Fill(12, ps, 1<<40))
			k.Terminate()
			p.NoSenders(left[0])
			left = left[1:]
			for _, other := range left {
				m := s.objects[other]
				k := emmtest.NewKernel(t, p, other, ps)
				k.Init()
				for page, got := range readRaw(t, p, k, other, pages) {
					if !bytes.Equal(got, contents(m.last[page], page)) && !bytes.Equal(got, contents(m.now[page], page)) {
						t.Errorf("killed at step %d (%s): page %d of another object changed after the restart", i, s.step, page)
					}
				}
			}
		}
		checkEmpty(t, p, f)
		s.w.mu.Lock()
		for name := range s.w.mem {
			if strings.HasPrefix(name, "map.") {
				t.Errorf("killed at step %d (%s): %s is left", i, s.step, name)
			}
		}
		s.w.mu.Unlock()
	}
	t.Logf("%d steps", len(states))
	for _, step := range []string{"allocated", "written", "free", "freed", "pager.allocated", "pager.stored", "pager.committed", "pager.freed", "pager.reserved", "snapshot.reserved",
		"snapshot.batch", "snapshot.copied", "pager.mapped", "pager.published", "snapshot.published", "pager.dropped", "pager.release", "pager.released"} {
		if !seen[step] {
			t.Errorf("never killed at %q", step)
		}
	}
	p.Close()
}

// Snapshots of objects that are written and read, in several goroutines, while others end.
func TestSnapshotChurn(t *testing.T) {
	for name, open := range stores {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			p := newPager(t, s)
			root, port := attach(t, p, 4*chunkPages, ps)
			root.Write(0, emmtest.Fill(32, ps, 1))
			root.Write(3*chunkPages*ps, emmtest.Fill(32, ps, 1))
			var workers sync.WaitGroup
			for w := range 4 {
				workers.Go(func() {
					for v := range uint64(20) {
						seed := uint64(w)<<32 + v + 2
						k := vm{emmtest.NewKernel(t, p, port, ps), port}
						k.Inherit(root)
						a := k.snapshot(t, p, ps)
						a.Read(run(0, 40))
						a.Write(8*ps, emmtest.Fill(8, ps, seed))
						l := a.Give(16*ps, emmtest.Fill(8, ps, seed+1<<20), false)
						b := a.snapshot(t, p, ps)
						r := b.Ask(run(0, 16), 0)
						if v%2 == 0 {
							a.end(p, l)
						}
						r.Wait()
						b.Write(3*chunkPages*ps, make([]byte, 16*ps))
						b.Read(run(3*chunkPages, 40))
						b.Read(run(16, 8)) // with or without the loan
						if v%2 != 0 {
							a.Read(run(3*chunkPages, 40))
							a.end(p, l)
						}
						b.end(p)
					}
				})
			}
			done := make(chan struct{})
			go func() { workers.Wait(); close(done) }()
			select {
			case <-done:
			case <-time.After(3 * emmtest.Deadline):
				t.Fatal("snapshots hang")
			}
			root.Read(run(0, 40))
			root.Terminate()
			p.NoSenders(port)
			checkEmpty(t, p, s)
			s.Close()
		})
	}
}
