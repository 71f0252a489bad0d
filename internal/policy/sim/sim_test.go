package sim

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"machpager/internal/policy"
)

var update = flag.Bool("update", false, "rewrite the table in docs/policy.md and its plot")

const (
	colOptimal = iota
	colLRU
	colFIFO
	colTwoQ
	colS3
	colDefault
	colSeen // the default, and one touch in 64 is seen
	numCols
)

var columns = [numCols]string{"optimum", "LRU", "FIFO", "2Q", "S3-FIFO", "refault", "refault, 1/64 seen"}

// row is one trace at one capacity under all policies.
type row struct {
	trace    *Trace
	capacity int64
	results  [numCols]Result
}

func newPolicy(t testing.TB, name string, capacity int64) policy.Replacement {
	p, err := policy.New(name, policy.Options{Capacity: capacity, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// compared runs everything once, for all tests.
var compared = sync.OnceValue(func() []row {
	var rows []row
	for _, c := range capacities {
		for _, tr := range Traces(c) {
			r := row{trace: tr, capacity: c}
			one := Config{Capacity: c}
			seen := Config{Capacity: c, Visible: 64}
			fifo, _ := policy.New("fifo", policy.Options{Capacity: c, Seed: 1})
			def, _ := policy.New("", policy.Options{Capacity: c, Seed: 1})
			def64, _ := policy.New("", policy.Options{Capacity: c, Seed: 1})
			r.results = [numCols]Result{Optimal(tr, c), LRU(tr, c), Run(tr, fifo, one), Run(tr, TwoQ(c), one), Run(tr, S3FIFO(c), one), Run(tr, def, one), Run(tr, def64, seen)}
			tr.Pages, tr.Hot = nil, nil
			rows = append(rows, r)
		}
	}
	return rows
})

// TestDefaultAgainstFIFO is what the default must do.
func TestDefaultAgainstFIFO(t *testing.T) {
	for _, r := range compared() {
		name := fmt.Sprintf("%s, %d frames", r.trace.Name, r.capacity)
		fifo := r.results[colFIFO]
		for _, col := range []int{colDefault, colSeen} {
			is := r.results[col]
			allowed := 1.0
			if r.trace.Skewed {
				allowed = 0.75
			} else if !r.trace.Better {
				allowed = 1.01
			}
			if is.Ratio() > allowed*fifo.Ratio() {
				t.Errorf("%s: %s misses %.4f of the references, FIFO %.4f: more than %.2f of that", name, columns[col], is.Ratio(), fifo.Ratio(), allowed)
			}
			if r.trace.Skewed && is.HotReferences > 0 && is.HotRatio() >= 0.01 {
				t.Errorf("%s: %s misses %.4f of the references to a hot set that fits: 1 %% or more", name, columns[col], is.HotRatio())
			}
		}
		for col, is := range r.results {
			if is.Ratio() < r.results[colOptimal].Ratio() {
				t.Errorf("%s: %s misses %.4f of the references, fewer than the optimum", name, columns[col], is.Ratio())
			}
		}
	}
}

// TestKnownOptimum checks the yardsticks where they are known: a loop of n pages in memory for c misses always with LRU, and (n-c)/(n-1) at best.
func TestKnownOptimum(t *testing.T) {
	tr := Loop("loop", 200, 200*400)
	if r := LRU(tr, 100); r.Ratio() != 1 {
		t.Errorf("LRU misses %v of a loop", r.Ratio())
	}
	if r := Optimal(tr, 100); r.Ratio() < 0.500 || r.Ratio() > 0.506 {
		t.Errorf("the optimum misses %v of a loop, (200-100)/199 expected", r.Ratio())
	}
	if r := LRU(tr, 200); r.Misses != 0 {
		t.Errorf("LRU misses %d times after the warm-up when all fits", r.Misses)
	}
}

// TestRuns: with clusters and batches, what was filled together is evicted together, at no loss.
func TestRuns(t *testing.T) {
	const c = 4096
	for _, tr := range []*Trace{Once(40 * c), ScanHot(c/2, 16*c, 0.5, 40*c), Uniform(8*c, 20*c)} {
		for _, name := range policy.Names() {
			r := Run(tr, newPolicy(t, name, c), Config{Capacity: c, Cluster: 16, Batch: 64})
			if length := float64(r.Evicted) / float64(r.Runs); length < 8 {
				t.Errorf("%s: %s evicts runs of %.1f pages of clusters of 16", tr.Name, name, length)
			}
		}
	}
}

// TestDocument: docs/policy.md says what the policies do now. With -update it writes the table and draws the plot.
func TestDocument(t *testing.T) {
	const file, begin, end = "../../../docs/policy.md", "<!-- table -->\n", "<!-- end of table -->\n"
	lines := []string{"| trace | frames | " + strings.Join(columns[:], " | ") + " | refault / FIFO |\n", "|---|" + strings.Repeat("---|", numCols+2) + "\n"}
	for _, r := range compared() {
		var b strings.Builder
		fmt.Fprintf(&b, "| %s | %d", r.trace.Name, r.capacity)
		for _, is := range r.results {
			fmt.Fprintf(&b, " | %.1f", 100*is.Ratio())
			if is.HotReferences > 0 {
				fmt.Fprintf(&b, " (%.2f)", 100*is.HotRatio())
			}
		}
		fmt.Fprintf(&b, " | %.2f |\n", r.results[colDefault].Ratio()/r.results[colFIFO].Ratio())
		lines = append(lines, b.String())
	}
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(old), begin)
	table, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", file)
	}
	if *update {
		if err := os.WriteFile(file, []byte(head+begin+strings.Join(lines, "")+end+tail), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := drawPlot("../../../docs/policy.svg", compared()); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, line := range lines {
		if !strings.Contains(table, line) {
			t.Errorf("%s does not say: %s(go test ./internal/policy/sim -run TestDocument -update)", file, line)
		}
	}
}
