package policy

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// model is what must be true of any Replacement that is told the same: which frames are resident.
type model struct {
	t        *rapid.T
	p        *queues
	resident map[frameOf]bool
	last     []Run // victims that may be kept
}

type frameOf struct {
	object uint64
	frame  int64
}

// check compares the accounts of the policy with the model, and the policy's structures with each other.
func (m *model) check() {
	q := m.p
	if s := q.Stats(); s.Resident != int64(len(m.resident)) || s.Resident != s.Filled+s.Kept-s.Victims-s.Forgotten {
		m.t.Fatalf("%d frames are resident, the policy says %+v", len(m.resident), s)
	}
	seen := map[frameOf]bool{}
	units := int64(0)
	for k := range q.queues {
		l, frames, count, prev := &q.queues[k], int64(0), int64(0), uint32(0)
		for i := l.head; i != 0; i = q.table.at(i).next {
			u := q.table.at(i)
			if u.prev != prev || u.queue() != k || u.frame()%u.frames() != 0 || q.table.find(u.object, u.frame(), u.order()) != i {
				m.t.Fatalf("unit %d of queue %d is not well formed: %+v", i, k, *u)
			}
			for f := u.frame(); f < u.frame()+u.frames(); f++ {
				at := frameOf{u.object, f}
				if _, ok := m.resident[at]; !ok || seen[at] {
					m.t.Fatalf("frame %v is in the queues, resident %v, before %v", at, ok, seen[at])
				}
				seen[at] = true
			}
			frames, count, prev = frames+u.frames(), count+1, i
		}
		if l.frames != frames || l.units != count || l.tail != prev {
			m.t.Fatalf("queue %d has %d frames in %d units, %d and %d by its account", k, frames, count, l.frames, l.units)
		}
		units += count
	}
	if len(seen) != len(m.resident) || units != q.table.live {
		m.t.Fatalf("%d frames in %d units are in the queues, %d are resident, the table has %d units", len(seen), units, len(m.resident), q.table.live)
	}
}

func (m *model) forget(r Run) {
	for f := r.First; f < r.First+r.N; f++ {
		delete(m.resident, frameOf{r.Object, f})
	}
}

func (m *model) add(r Run) {
	for f := r.First; f < r.First+r.N; f++ {
		m.resident[frameOf{r.Object, f}] = true
	}
}

// isUnit says whether the frame is a unit by itself.
func (m *model) isUnit(r Run) bool {
	i := m.p.table.covering(r.Object, r.First)
	return i != 0 && m.p.table.at(i).order() == 0
}

func drawRun(t *rapid.T, unit int64) Run {
	first := rapid.Int64Range(0, 2048/unit-1).Draw(t, "first") * unit
	n := rapid.Int64Range(1, max(1, 64/unit)).Draw(t, "n") * unit
	return Run{rapid.Uint64Range(1, 3).Draw(t, "object"), first, n}
}

func drawUnit(t *rapid.T) int64 {
	return int64(1) << rapid.SampledFrom([]int{0, 0, 0, 1, 4, 9}).Draw(t, "order")
}

// TestModel: whatever happens in whatever order, each resident frame is in the queues exactly once, and victims are resident.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		levels := rapid.SampledFrom([]int{1, maxLevels}).Draw(t, "levels")
		m := &model{t: t, p: newQueues(levels, Options{Capacity: rapid.Int64Range(1, 3000).Draw(t, "capacity"), Seed: 1}), resident: map[frameOf]bool{}}
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) { m.t = t; m.check() },
			"fill": func(t *rapid.T) {
				unit := drawUnit(t)
				r := drawRun(t, unit)
				before := int64(len(m.resident))
				m.forget(r)
				forgotten := before - int64(len(m.resident))
				m.p.Fill(r, unit, rapid.Int64Range(r.First-1, r.First+r.N-1).Draw(t, "need"))
				m.add(r)
				m.p.mu.Lock()
				m.p.stats.Forgotten += forgotten // what was filled twice is not told
				m.p.mu.Unlock()
			},
			"touch": func(t *rapid.T) {
				m.p.Touch(rapid.Uint64Range(1, 3).Draw(t, "object"), rapid.Int64Range(0, 2100).Draw(t, "frame"))
			},
			"forget": func(t *rapid.T) {
				r := drawRun(t, 1)
				if rapid.IntRange(0, 9).Draw(t, "all") == 0 {
					r.First, r.N = 0, 1<<40
					for at := range m.resident {
						if at.object == r.Object {
							delete(m.resident, at)
						}
					}
				} else {
					m.forget(r)
				}
				m.p.Forget(r)
			},
			"cold": func(t *rapid.T) {
				r := drawRun(t, 1)
				m.p.Cold(r)
				if r.N == 1 && m.isUnit(r) {
					if i := m.p.table.covering(r.Object, r.First); m.p.table.at(i).queue() != coldQueue {
						t.Fatalf("%v is not cold", r)
					}
				}
			},
			"victims": func(t *rapid.T) {
				want := rapid.Int64Range(1, 200).Draw(t, "want")
				before := int64(len(m.resident))
				m.last = m.p.Victims(want, m.last[:0])
				got := int64(0)
				for _, r := range m.last {
					for f := r.First; f < r.First+r.N; f++ {
						if _, ok := m.resident[frameOf{r.Object, f}]; !ok {
							t.Fatalf("victim %v is not resident", r)
						}
						delete(m.resident, frameOf{r.Object, f})
					}
					got += r.N
				}
				if got < min(want, before) || got >= want+MaxUnit {
					t.Fatalf("%d frames were given, %d wanted, %d resident", got, want, before)
				}
			},
			"next": func(t *rapid.T) {
				seen := map[frameOf]bool{}
				for _, r := range m.p.Next(rapid.Int64Range(1, 200).Draw(t, "want"), nil) {
					for f := r.First; f < r.First+r.N; f++ {
						at := frameOf{r.Object, f}
						if _, ok := m.resident[at]; !ok || seen[at] {
							t.Fatalf("%v is to be a victim, and is not resident, or twice", r)
						}
						seen[at] = true
					}
				}
			},
			"keep": func(t *rapid.T) {
				for _, r := range m.last {
					if rapid.Bool().Draw(t, "keep") {
						before := int64(len(m.resident))
						m.forget(r)
						gone := before - int64(len(m.resident))
						m.p.Keep(r, 1)
						m.add(r)
						m.p.mu.Lock()
						m.p.stats.Forgotten += gone
						m.p.mu.Unlock()
					}
				}
				m.last = m.last[:0]
			},
			"resize": func(t *rapid.T) { m.p.Resize(rapid.Int64Range(1, 3000).Draw(t, "capacity")) },
		})
	})
}

// TestKeepReachesAll: who keeps every victim but one gets that one after at most one turn.
func TestKeepReachesAll(t *testing.T) {
	for _, name := range Names() {
		p, err := New(name, Options{Capacity: 64, Seed: 1})
		if err != nil {
			t.Fatal(err)
		}
		rnd := rand.New(rand.NewPCG(1, 2))
		resident := map[int64]bool{}
		for range 5000 { // until all levels are in use
			f := rnd.Int64N(100)
			if resident[f] {
				continue
			}
			if len(resident) == 64 {
				for _, v := range p.Victims(1, nil) {
					delete(resident, v.First)
				}
			}
			p.Fill(Run{1, f, 1}, 1, f)
			resident[f] = true
		}
		for wanted := range resident {
			for n := 0; ; n++ {
				v := p.Victims(1, nil)[0]
				p.Keep(v, 1)
				if v.First == wanted {
					break
				}
				if n > 2*len(resident) {
					t.Fatalf("%s: frame %d is never a victim when the others are kept", name, wanted)
				}
			}
		}
	}
}

// TestNext: while nothing else happens, what is forecast are the victims, one after the other, of all levels.
func TestNext(t *testing.T) {
	for _, name := range Names() {
		p, err := New(name, Options{Capacity: 256, Seed: 1})
		if err != nil {
			t.Fatal(err)
		}
		rnd := rand.New(rand.NewPCG(3, 4))
		resident := map[int64]bool{}
		for range 20000 {
			f := 2 * min(rnd.Int64N(400), rnd.Int64N(400)) // no neighbours, which would go along
			if resident[f] {
				continue
			}
			if len(resident) == 256 {
				delete(resident, p.Victims(1, nil)[0].First)
			}
			p.Fill(Run{1, f, 1}, 1, f)
			resident[f] = true
		}
		p.Cold(Run{1, 10, 1})
		next := p.Next(100, nil)
		if len(next) < 100 {
			t.Fatalf("%s: %d frames are forecast, want 100", name, len(next))
		}
		right := 0
		for _, want := range next {
			if got := p.Victims(1, nil)[0]; got == want {
				right++
			}
		}
		// Evictions teach, and may change a level's term on the way.
		if name == "fifo" && right != len(next) || right < 90 {
			t.Errorf("%s: %d of %d victims were as forecast", name, right, len(next))
		}
	}
}

// TestColdFirst: what was advised cold goes first, in order, in one run; a folio goes as one.
func TestColdFirst(t *testing.T) {
	p, err := New("", Options{Capacity: 4096, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	p.Fill(Run{1, 0, 512}, 512, 3)
	p.Fill(Run{2, 0, 64}, 1, 3)
	p.Cold(Run{2, 16, 32})
	if v := p.Victims(32, nil); len(v) != 1 || v[0] != (Run{2, 16, 32}) {
		t.Errorf("victims are %v, not what is cold", v)
	}
	if v := p.Victims(1, nil); len(v) != 1 || v[0] != (Run{1, 0, 512}) {
		t.Errorf("victims are %v, not the extent that was filled as one folio", v)
	}
}

// TestSplit: a page discarded out of an extent leaves the rest resident.
func TestSplit(t *testing.T) {
	p, err := New("", Options{Capacity: 4096, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	p.Fill(Run{1, 512, 512}, 512, -1)
	p.Forget(Run{1, 700, 1})
	s := p.Stats()
	if s.Resident != 511 || s.Units != 9 || s.Forgotten != 1 {
		t.Errorf("without one page an extent has %+v", s)
	}
	if v := p.Victims(511, nil); len(v) != 2 || v[0] != (Run{1, 512, 188}) || v[1] != (Run{1, 701, 323}) {
		t.Errorf("it is evicted as %v", v)
	}
}

// TestSteadyMemory: nothing is allocated, and nothing grows, while pages come and go.
func TestSteadyMemory(t *testing.T) {
	p, err := New("", Options{Capacity: 1 << 14, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	dst := make([]Run, 0, 64)
	resident := make([]bool, 1<<16)
	n := 0
	fill := func() {
		f := rnd.Int64N(int64(len(resident)))
		if resident[f] {
			p.Touch(1, f)
			return
		}
		if n == 1<<14 {
			dst = p.Victims(16, dst[:0])
			for _, v := range dst {
				for i := range v.N {
					resident[v.First+i] = false
					n--
				}
			}
		}
		p.Fill(Run{1, f, 1}, 1, f)
		resident[f] = true
		n++
	}
	for range 1 << 18 {
		fill()
	}
	before := p.Stats().Bytes
	if a := testing.AllocsPerRun(100000, fill); a != 0 {
		t.Errorf("%v allocations for each fill", a)
	}
	if after := p.Stats().Bytes; after != before || after > (1<<14)*(32+4+64)+64<<10 {
		t.Errorf("%d bytes are held for %d frames, %d before", after, 1<<14, before)
	}
}

// TestConcurrent: many goroutines, each with frames of its own, so that the end is known.
func TestConcurrent(t *testing.T) {
	p, err := New("", Options{Capacity: 1 << 12})
	if err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(time.Minute, func() { panic("the policy hangs") })
	defer watchdog.Stop()
	var wg sync.WaitGroup
	var mu sync.Mutex
	evicted := map[frameOf]int{}
	filled := map[frameOf]int{}
	for g := range uint64(8) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(g, 1))
			for i := range int64(4000) {
				r := Run{g, i * 4, 4}
				mu.Lock()
				for f := range r.N {
					filled[frameOf{g, r.First + f}]++
				}
				mu.Unlock()
				p.Fill(r, 1, r.First)
				switch rnd.IntN(8) {
				case 0:
					p.Touch(g, rnd.Int64N(r.First+1))
				case 1:
					p.Cold(Run{g, rnd.Int64N(r.First + 1), 16})
				case 2:
					p.Resize(1<<11 + rnd.Int64N(1<<12))
				case 3, 4, 5:
					v := p.Victims(8, nil)
					mu.Lock()
					for _, r := range v {
						for f := range r.N {
							evicted[frameOf{r.Object, r.First + f}]++
						}
					}
					mu.Unlock()
				}
				p.Stats()
			}
		})
	}
	wg.Wait()
	p.Forget(Run{1, 0, 1 << 40})
	for _, v := range p.Victims(1<<20, nil) {
		if v.Object == 1 {
			t.Errorf("victim %v was forgotten", v)
		}
		for f := range v.N {
			evicted[frameOf{v.Object, v.First + f}]++
		}
	}
	for at := range filled {
		if n := evicted[at]; n > 1 || n == 0 && at.object != 1 {
			t.Fatalf("frame %v was filled once and evicted %d times", at, n)
		}
	}
	if s := p.Stats(); s.Resident != 0 || s.Units != 0 || s.Cold != 0 {
		t.Errorf("all is evicted, and there is %+v", s)
	}
}

func TestNew(t *testing.T) {
	if _, err := New("", Options{}); err == nil {
		t.Error("a policy without capacity was made")
	}
	if _, err := New("clock", Options{Capacity: 1}); err == nil {
		t.Error("a policy of an unknown name was made")
	}
	for _, name := range Names() {
		if _, err := New(name, Options{Capacity: 1}); err != nil {
			t.Error(err)
		}
	}
}

// BenchmarkFillVictims is one page in and one out, at a budget of 1 GiB, alone and in runs. It reports the time of a page.
func BenchmarkFillVictims(b *testing.B) {
	const capacity = 1 << 18
	for _, name := range Names() {
		for _, c := range []struct {
			what    string
			n, unit int64
			random  bool
		}{{"single,random", 1, 1, true}, {"run16", 16, 1, false}, {"run512", 512, 1, false}, {"extent", 512, 512, false}} {
			b.Run(name+"/"+c.what, func(b *testing.B) {
				p, err := New(name, Options{Capacity: capacity, Seed: 1})
				if err != nil {
					b.Fatal(err)
				}
				rnd := rand.New(rand.NewPCG(1, 2))
				var dst []Run
				resident := int64(0)
				step := func(i int64) {
					r := Run{1, i * c.n, c.n}
					if c.random {
						r.First = rnd.Int64N(1 << 40)
					}
					if resident+c.n > capacity {
						dst = p.Victims(max(c.n, 64), dst[:0])
						for _, v := range dst {
							resident -= v.N
						}
					}
					p.Fill(r, c.unit, r.First)
					resident += c.n
				}
				i := int64(0)
				for ; i < 2*capacity/c.n; i++ {
					step(i)
				}
				b.ReportAllocs()
				b.ResetTimer()
				for range b.N {
					step(i)
					i++
				}
				b.ReportMetric(float64(b.Elapsed())/float64(b.N)/float64(c.n), "ns/page")
			})
		}
	}
}

func BenchmarkTouch(b *testing.B) {
	const capacity = 1 << 18
	p, err := New("", Options{Capacity: capacity, Seed: 1})
	if err != nil {
		b.Fatal(err)
	}
	for f := int64(0); f < capacity; f += 16 {
		p.Fill(Run{1, f, 16}, 1, f)
	}
	p.Fill(Run{2, 0, 512}, 512, 0)
	rnd := rand.New(rand.NewPCG(1, 2))
	b.ResetTimer()
	for range b.N {
		p.Touch(1, rnd.Int64N(capacity))
	}
}
