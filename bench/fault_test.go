//go:build linux

package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"
)

// tiny is the smallest benchmark that measures everything.
func tiny(t *testing.T) *FaultOptions {
	return &FaultOptions{Rounds: 1, Pages: 64, Stream: 4 << 20, Clusters: []int{1, 16, 512}, Warm: 64 << 20, Dir: t.TempDir()}
}

// TestFault runs every benchmark once.
func TestFault(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	o := tiny(t)
	start := time.Now()
	r, err := Fault(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("took %v", time.Since(start))
	t.Run("JSON", func(t *testing.T) { testJSON(t, r) })
	t.Run("table", func(t *testing.T) { testTable(t, r) })
	t.Run("plot", func(t *testing.T) { testPlot(t, r) })
}

// measurable says what every system must be able to do.
func measurable(system string, op Op) bool {
	switch system {
	case Machpager, Floor, FloorBlock:
		return true
	case Mapper:
		return haveMapper && op != Minor && op != WriteProtect
	case Anon:
		return op == ZeroRead || op == ZeroWrite || op == WriteProtect
	case Memfd:
		return op == ZeroRead || op == ZeroWrite || op == Minor
	case Read, File:
		return op == StoredRead
	}
	return false
}

func testJSON(t *testing.T, measured *FaultReport) {
	var b bytes.Buffer
	if err := measured.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var r FaultReport
	dec := json.NewDecoder(&b)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		t.Fatal(err)
	}
	for _, p := range []Placement{SameCore, Free} {
		for _, s := range Systems {
			for _, op := range Ops {
				if s != FloorExtents {
					testLatency(t, &r, s, op, p)
				}
			}
			for _, op := range []Op{ZeroRead, StoredRead} {
				if s != FloorBlock {
					testStream(t, &r, s, op, p)
				}
			}
		}
		if n := countGoals(&r, p); n != 2*len(Ops)+1 {
			t.Errorf("%s: %d goals, want %d", p, n, 2*len(Ops)+1)
		}
	}
}

func countGoals(r *FaultReport, p Placement) (n int) {
	for _, g := range r.Goals {
		if g.Placement == p && g.Ratio.Median > 0 {
			n++
		}
	}
	return n
}

func testLatency(t *testing.T, r *FaultReport, system string, op Op, p Placement) {
	i := slices.IndexFunc(r.Latency, func(l Latency) bool { return l.System == system && l.Op == op && l.Placement == p })
	if i < 0 {
		t.Errorf("no row for %s, %s, %s", system, op, p)
		return
	}
	l := r.Latency[i]
	if !measurable(system, op) {
		if l.None == "" {
			t.Errorf("%s, %s, %s: measured %+v, want a reason why not", system, op, p, l.P50)
		}
		return
	}
	if l.None != "" || l.Pooled.Count < 16 || l.P50.Median <= 0 || l.P50.Min > l.P50.Median || l.P50.Median > l.P50.Max || l.P99.Median < l.P50.Median {
		t.Errorf("%s, %s, %s: %+v", system, op, p, l)
	}
	// Every touch is one fault, else something else was measured. The kernel does not count one that a signal interrupted, and counts a new page of
	// the stack.
	if l.Faults < 0.9 || l.Faults > 1.3 {
		t.Errorf("%s, %s, %s: %.2f faults per page, want 1", system, op, p, l.Faults)
	}
}

func testStream(t *testing.T, r *FaultReport, system string, op Op, p Placement) {
	found, measured := false, false
	for _, s := range r.Streams {
		if s.System == system && s.Op == op && s.Placement == p {
			found = true
			measured = measured || s.None == "" && s.Rate.Min > 0 && s.Rate.Min <= s.Rate.Median && s.Rate.Median <= s.Rate.Max
		}
	}
	if !found || measured != (measurable(system, op) || system == FloorExtents) {
		t.Errorf("stream of %s, %s, %s: there %v, measured %v", system, op, p, found, measured)
	}
}

func testTable(t *testing.T, r *FaultReport) {
	var b strings.Builder
	if err := r.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, s := range append(slices.Clone(Systems), "Goals:", "zero-write p50", "sequential stored stream") {
		if !strings.Contains(b.String(), s) {
			t.Errorf("the table does not name %q:\n%s", s, &b)
		}
	}
}

func testPlot(t *testing.T, r *FaultReport) {
	var b bytes.Buffer
	if err := r.WriteSVG(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for dec := xml.NewDecoder(&b); ; {
		if _, err := dec.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("not XML: %v", err)
		}
	}
	for _, s := range []string{Machpager, Floor, Anon} {
		if !strings.Contains(text, ">"+s+"<") {
			t.Errorf("the plot does not name %s", s)
		}
	}
}

func TestFaultRefuses(t *testing.T) {
	for name, o := range map[string]*FaultOptions{
		"unknown system": {Systems: []string{"no such"}},
		"odd cluster":    {Clusters: []int{3}},
		"huge cluster":   {Clusters: []int{1024}},
		"no rounds":      {Rounds: -1},
		"no pages":       {Pages: -1},
	} {
		if _, err := Fault(t.Context(), o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestFaultWithoutCompiler(t *testing.T) {
	t.Setenv("CC", "no-such-compiler")
	_, err := Fault(t.Context(), &FaultOptions{Systems: []string{Floor}})
	if err == nil || !strings.Contains(err.Error(), "make deps") {
		t.Errorf("error %v does not say what to install", err)
	}
}

// TestFaultCancel ends a benchmark that would take long, and leaves no process behind.
func TestFaultCancel(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	o := tiny(t)
	o.Systems, o.Rounds = []string{Floor, Anon}, 1<<20
	start := time.Now()
	if _, err := Fault(ctx, o); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want that of the context", err)
	}
	if d := time.Since(start); d > 20*time.Second {
		t.Errorf("took %v to end", d)
	}
}

// TestWrongContents: a system that answers with wrong contents is not measured.
func TestWrongContents(t *testing.T) {
	for name, stored := range map[string]bool{"zeros for contents": true, "contents for zeros": false} {
		mem := make([]byte, 8*pageSize)
		if !stored {
			fillAll(mem)
		}
		_, err := measure(&target{mem: mem, stored: stored}, workload{Op: ZeroRead, Pages: 8})
		if err == nil || !strings.Contains(err.Error(), "wrong contents") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestOrder(t *testing.T) {
	a := order(workload{Order: Random, Seed: 1}, 512, 16)
	b := order(workload{Order: Random, Seed: 2}, 512, 16)
	if slices.Equal(a, b) || slices.IsSorted(a) {
		t.Errorf("orders %v and %v are not random", a, b)
	}
	slices.Sort(a)
	if want := order(workload{Order: Sequential}, 512, 16); !slices.Equal(a, want) || len(want) != 32 || want[31] != 496 {
		t.Errorf("touches %v, want %v", a, want)
	}
}

func TestStats(t *testing.T) {
	v := []float64{5, 1, 4, 2, 3}
	if s := spread(v); s != (Spread{Median: 3, Min: 1, Max: 5}) {
		t.Errorf("spread of %v is %+v", v, s)
	}
	hundred := make([]int, 100)
	for i := range hundred {
		hundred[i] = i + 1
	}
	for q, want := range map[float64]int{0: 1, 0.5: 50, 0.99: 99, 1: 100} {
		if got := quantile(hundred, q); got != want {
			t.Errorf("quantile %v of 1..100 is %d, want %d", q, got, want)
		}
	}
	if g := atMost("x", Free, ratios([]float64{2, 3, 9}, []float64{2, 2, 3}), 1.4); g.Met || g.Ratio.Median != 1.5 || g.Ratio.Max != 3 {
		t.Errorf("goal %+v", g)
	}
}
