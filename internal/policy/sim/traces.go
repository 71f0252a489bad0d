package sim

import (
	"fmt"
	"math"
	"math/rand/v2"
	"sort"
)

// Traces are the patterns that policies are judged by, for a memory of capacity frames.
func Traces(capacity int64) []*Trace {
	c := int32(capacity)
	n := 200 * int(capacity)
	return []*Trace{
		Zipf(0.7, 8*c, n), Zipf(0.9, 8*c, n), Zipf(1.0, 8*c, n), Zipf(1.2, 8*c, n),
		ScanHot(c/2, 16*c, 0.5, n), ScanHot(c*3/4, 16*c, 0.9, 3*n), ScanHot(c/8, 16*c, 0.05, n),
		Churn(c/2, 8*c, 0.5, n), Churn(c*3/4, 8*c, 0.9, 3*n),
		Loop("loop, 1.1 x memory", c+c/8, n), Loop("loop, 2 x memory", 2*c, n),
		Uniform(4*c, n), Once(n),
		Phases(0.9, 8*c, 8, n), Drift(c, n), Sweep(2*c, n), Sort(4*c, n),
	}
}

func source(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 42)) }

// zipf draws ranks from 0 to n-1 with probability proportional to 1/(rank+1)^s.
type zipf struct {
	sum []float64
	rnd *rand.Rand
}

func newZipf(rnd *rand.Rand, s float64, n int32) *zipf {
	z := &zipf{make([]float64, n), rnd}
	t := 0.0
	for i := range z.sum {
		t += math.Pow(float64(i+1), -s)
		z.sum[i] = t
	}
	return z
}

func (z *zipf) draw() int32 {
	x := z.rnd.Float64() * z.sum[len(z.sum)-1]
	return int32(min(sort.SearchFloat64s(z.sum, x), len(z.sum)-1))
}

func permutation(rnd *rand.Rand, n int32) []int32 {
	p := make([]int32, n)
	for i := range p {
		p[i] = int32(i)
	}
	rnd.Shuffle(len(p), func(i, j int) { p[i], p[j] = p[j], p[i] })
	return p
}

// Zipf references pages by rank; which pages have which rank is random.
func Zipf(s float64, pages int32, n int) *Trace {
	rnd := source(1)
	z, perm := newZipf(rnd, s, pages), permutation(rnd, pages)
	t := &Trace{Name: fmt.Sprintf("Zipf %.1f", s), Skewed: s >= 0.9, Better: true, Max: pages, Pages: make([]int32, n)}
	for i := range t.Pages {
		t.Pages[i] = perm[z.draw()]
	}
	return t
}

// ScanHot scans pages again and again; part of the references go to a hot set instead, uniformly.
func ScanHot(hot, pages int32, part float64, n int) *Trace {
	rnd := source(2)
	t := &Trace{Name: fmt.Sprintf("scan + hot set, %.0f %% hot", part*100), Skewed: part > 0.1, Better: true, Max: hot + pages, Pages: make([]int32, n), Hot: make([]bool, n)}
	at := int32(0)
	for i := range t.Pages {
		if t.Hot[i] = rnd.Float64() < part; t.Hot[i] {
			t.Pages[i] = rnd.Int32N(hot)
			continue
		}
		t.Pages[i] = hot + at
		at = (at + 1) % pages
	}
	return t
}

// Churn is UMap's benchmark of that name: hot pages that are used all the time while a reader thrashes at random through the rest.
func Churn(hot, pages int32, part float64, n int) *Trace {
	rnd := source(3)
	t := &Trace{Name: fmt.Sprintf("churn, %.0f %% hot", part*100), Skewed: true, Better: true, Max: hot + pages, Pages: make([]int32, n), Hot: make([]bool, n)}
	for i := range t.Pages {
		if t.Hot[i] = rnd.Float64() < part; t.Hot[i] {
			t.Pages[i] = rnd.Int32N(hot)
			continue
		}
		t.Pages[i] = hot + rnd.Int32N(pages)
	}
	return t
}

// Loop goes round through more pages than there is memory for.
func Loop(name string, pages int32, n int) *Trace {
	t := &Trace{Name: name, Better: true, Max: pages, Pages: make([]int32, n)}
	for i := range t.Pages {
		t.Pages[i] = int32(i) % pages
	}
	return t
}

// Uniform references pages at random.
func Uniform(pages int32, n int) *Trace {
	rnd := source(4)
	t := &Trace{Name: "uniform random", Max: pages, Pages: make([]int32, n)}
	for i := range t.Pages {
		t.Pages[i] = rnd.Int32N(pages)
	}
	return t
}

// Once references each page once, in order.
func Once(n int) *Trace {
	return Loop("sequential, once", int32(n), n)
}

// Phases is Zipf with other pages hot in each phase.
func Phases(s float64, pages int32, phases, n int) *Trace {
	rnd := source(5)
	z := newZipf(rnd, s, pages)
	t := &Trace{Name: fmt.Sprintf("Zipf %.1f, %d phases", s, phases), Better: true, Max: pages, Pages: make([]int32, n)}
	var perm []int32
	for i := range t.Pages {
		if i%(n/phases) == 0 {
			perm = permutation(rnd, pages)
		}
		t.Pages[i] = perm[z.draw()]
	}
	return t
}

// Drift references a neighbourhood, half as wide as the memory, that moves on: what was used lately is what will be used, and what was used often is not.
func Drift(capacity int32, n int) *Trace {
	rnd := source(6)
	t := &Trace{Name: "drifting locality", Pages: make([]int32, n)}
	for i := range t.Pages {
		p := int32(i/8) + int32(rnd.ExpFloat64()*float64(capacity)/2)
		t.Pages[i] = p
		t.Max = max(t.Max, p+1)
	}
	return t
}

// Sweep goes up and down through the pages.
func Sweep(pages int32, n int) *Trace {
	t := &Trace{Name: "up and down", Max: pages, Pages: make([]int32, n)}
	for i := range t.Pages {
		if t.Pages[i] = int32(i) % (2 * pages); t.Pages[i] >= pages {
			t.Pages[i] = 2*pages - 1 - t.Pages[i]
		}
	}
	return t
}

// Sort is the references of a quicksort: each partition is swept from both ends, then its halves.
func Sort(pages int32, n int) *Trace {
	rnd := source(7)
	t := &Trace{Name: "quicksort", Max: pages}
	var sorted func(a, b int32)
	sorted = func(a, b int32) {
		lo, hi := a, b-1
		for lo <= hi && len(t.Pages) < n {
			if rnd.IntN(2) == 0 {
				t.Pages = append(t.Pages, lo)
				lo++
			} else {
				t.Pages = append(t.Pages, hi)
				hi--
			}
		}
		if b-a > 1 && len(t.Pages) < n {
			mid := a + (b-a)/4 + rnd.Int32N((b-a)/2+1)
			mid = max(a+1, min(mid, b-1))
			sorted(a, mid)
			sorted(mid, b)
		}
	}
	for len(t.Pages) < n {
		sorted(0, pages)
	}
	return t
}
