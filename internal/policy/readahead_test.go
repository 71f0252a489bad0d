package policy

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// reader plays a task with memory enough: pages that were asked for are there.
type reader struct {
	r       *ReadAhead
	there   map[int64]bool
	faults  int
	filled  int64
	windows []int64
	behind  []int64
}

func newReader(max int64) *reader { return &reader{r: NewReadAhead(max), there: map[int64]bool{}} }

func (d *reader) touch(t *testing.T, p int64) {
	t.Helper()
	if d.there[p] {
		return
	}
	w := d.r.Fault(p)
	if w.N < 1 || p < w.First || p >= w.First+w.N || w.First < 0 {
		t.Fatalf("a fault at page %d asks for %+v", p, w)
	}
	d.faults++
	d.windows = append(d.windows, w.N)
	for i := range w.N {
		if !d.there[w.First+i] {
			d.filled++
		}
		d.there[w.First+i] = true
	}
	for i := range w.BehindN {
		d.behind = append(d.behind, w.BehindFirst+i)
	}
}

func TestReadAheadGrows(t *testing.T) {
	for _, dir := range []int64{1, -1} {
		d := newReader(512)
		const n = 1 << 14
		for i := range int64(n) {
			p := i
			if dir < 0 {
				p = n - 1 - i
			}
			d.touch(t, p)
		}
		if want := []int64{1, 4, 16, 64, 256}; !slices.Equal(d.windows[:5], want) {
			t.Errorf("direction %d: windows are %v, not %v", dir, d.windows[:5], want)
		}
		if whole := d.windows[6 : len(d.windows)-1]; slices.Min(whole) != 512 {
			t.Errorf("direction %d: windows are %v then, not whole extents", dir, whole)
		}
		if len(d.behind) != 0 {
			t.Errorf("direction %d: pages are dropped without advice", dir)
		}
	}
}

func TestReadAheadInterleaved(t *testing.T) {
	d := newReader(512)
	const n = 1 << 13
	for i := range int64(n) {
		d.touch(t, i)
		d.touch(t, 1<<20+i)
		d.touch(t, 1<<22-1-i)
		d.touch(t, 1<<24+i)
	}
	if d.faults > 4*(n/512+8) {
		t.Errorf("four streams of %d pages fault %d times", n, d.faults)
	}
}

// TestReadAheadRandom: random faults fill hardly more than they need, also behind long streams.
func TestReadAheadRandom(t *testing.T) {
	d := newReader(512)
	for i := range int64(4096) {
		d.touch(t, i)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	d.filled, d.faults = 0, 0
	for range 20000 {
		d.touch(t, 1<<20+rnd.Int64N(1<<24))
	}
	if d.filled > int64(d.faults)*102/100 {
		t.Errorf("%d random faults fill %d pages", d.faults, d.filled)
	}
}

// TestReadAheadShortRuns: records of a few pages at random places: no window is much longer than the records.
func TestReadAheadShortRuns(t *testing.T) {
	d := newReader(512)
	rnd := rand.New(rand.NewPCG(1, 2))
	used := int64(0)
	for range 5000 {
		p := rnd.Int64N(1<<30) * 16
		for i := range int64(3) {
			d.touch(t, p+i)
			used++
		}
	}
	if d.filled > 2*used {
		t.Errorf("%d pages are used, %d filled", used, d.filled)
	}
	if m := slices.Max(d.windows); m > 4 {
		t.Errorf("a window has %d pages", m)
	}
	d.windows = nil
	for i := range int64(1 << 12) { // and a long stream is found all the same
		d.touch(t, 1<<40+i)
	}
	if slices.Max(d.windows) != 512 {
		t.Errorf("windows of a long stream behind short ones are %v", d.windows)
	}
}

// TestReadAheadThrash: pages that are evicted before they are used make the window smaller.
func TestReadAheadThrash(t *testing.T) {
	d := newReader(512)
	for i := range int64(4096) {
		d.touch(t, i)
	}
	for i := int64(4096); i < 4400; i++ {
		clear(d.there)
		d.windows = nil
		d.touch(t, i)
	}
	if d.windows[0] > 4 {
		t.Errorf("the window is still %d pages though nothing stays", d.windows[0])
	}
}

func TestReadAheadAdvice(t *testing.T) {
	const n = 4096
	for _, advice := range []Advice{Sequential, ReverseSequential} {
		d := newReader(512)
		d.r.SetAdvice(advice)
		last := int64(0)
		for i := range int64(n) {
			p := i
			if advice == ReverseSequential {
				p = n - 1 - i
			}
			d.touch(t, p)
			last = p
		}
		if d.faults != n/512 {
			t.Errorf("advice %d: %d faults for %d pages", advice, d.faults, n)
		}
		seen := map[int64]bool{}
		for _, p := range d.behind {
			if seen[p] || p < 0 || p >= n {
				t.Fatalf("advice %d: page %d is behind twice, or nowhere", advice, p)
			}
			seen[p] = true
		}
		if len(seen) != n-512-keepBehind || seen[last] {
			t.Errorf("advice %d: %d pages are behind of %d", advice, len(seen), n)
		}
	}
	d := newReader(512)
	d.r.SetAdvice(Random)
	for i := range int64(n) {
		d.touch(t, i)
	}
	if d.filled != n || d.faults != n {
		t.Errorf("advice random: %d faults fill %d pages", d.faults, d.filled)
	}
	d.r.SetAdvice(Normal)
	d.windows = nil
	for i := range int64(n) {
		d.touch(t, n+i)
	}
	if slices.Max(d.windows) != 512 {
		t.Errorf("after advice random, normal: windows are %v", d.windows)
	}
}

// TestReadAheadCut: who gets less than was asked for goes on where that ends.
func TestReadAheadCut(t *testing.T) {
	r := NewReadAhead(64)
	p := int64(0)
	sizes := []int64{}
	for range 30 {
		w := r.Fault(p)
		n := min(w.N, 10)
		r.Asked(n)
		p += n
		sizes = append(sizes, w.N)
	}
	if !slices.Equal(sizes[:3], []int64{1, 4, 16}) || slices.Max(sizes[20:]) < 50 { // up to the next multiple of 64
		t.Errorf("windows are %v", sizes)
	}
}

func FuzzReadAhead(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 200, 199, 198}, uint8(0))
	f.Fuzz(func(t *testing.T, pages []byte, advice uint8) {
		r := NewReadAhead(int64(advice))
		r.SetAdvice(Advice(advice % 4))
		for _, p := range pages {
			w := r.Fault(int64(p))
			if w.N < 1 || w.First < 0 || int64(p) < w.First || int64(p) >= w.First+w.N || w.N > max(1, int64(advice)) || w.BehindN < 0 ||
				w.BehindN > 0 && w.BehindFirst <= int64(p) && int64(p) < w.BehindFirst+w.BehindN {
				t.Fatalf("a fault at page %d asks for %+v", p, w)
			}
			if p%3 == 0 {
				r.Asked(w.N / 2)
			}
		}
	})
}

func BenchmarkReadAhead(b *testing.B) {
	for _, kind := range []string{"sequential", "random"} {
		b.Run(kind, func(b *testing.B) {
			r := NewReadAhead(512)
			rnd := rand.New(rand.NewPCG(1, 2))
			p := int64(0)
			b.ReportAllocs()
			for range b.N {
				if kind == "random" {
					p = rnd.Int64N(1 << 30)
				}
				w := r.Fault(p)
				p = w.First + w.N
			}
		})
	}
}
