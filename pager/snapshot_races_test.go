package pager

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
)

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
