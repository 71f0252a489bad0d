//go:build linux

package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// FaultReport is what [Fault] measured.
type FaultReport struct {
	Machine Machine      `json:"machine"`
	Options FaultOptions `json:"options"`
	Seconds float64      `json:"seconds"` // all of it took
	Latency []Latency    `json:"latency"`
	Streams []Stream     `json:"streams"`
	Goals   []Goal       `json:"goals"`
}

// Machine is where it was measured.
type Machine struct {
	Kernel     string  `json:"kernel"`
	Arch       string  `json:"arch"`
	Processor  string  `json:"processor"`
	CPUs       int     `json:"cpus"`
	Virtual    bool    `json:"virtual"`
	Available  int64   `json:"available_bytes"` // memory
	GoVersion  string  `json:"go"`
	LoadBefore float64 `json:"load_before"` // average of the last minute
	LoadAfter  float64 `json:"load_after"`
}

// String is a line for people.
func (m Machine) String() string {
	kind := ""
	if m.Virtual {
		kind = ", virtual"
	}
	return fmt.Sprintf("Linux %s, %s, %s, %d CPUs%s, %s. Load average %.2f before, %.2f after.",
		m.Kernel, m.Arch, m.Processor, m.CPUs, kind, m.GoVersion, m.LoadBefore, m.LoadAfter)
}

// Latency is that of a single touch.
type Latency struct {
	System    string       `json:"system"`
	Op        Op           `json:"op"`
	Placement Placement    `json:"placement"`
	None      string       `json:"none,omitempty"` // why there are no figures
	P50       Spread       `json:"p50_ns"`         // over the rounds
	P99       Spread       `json:"p99_ns"`         // over the rounds
	Pooled    Distribution `json:"pooled"`         // of all rounds together
	Faults    float64      `json:"faults_per_page"`
}

// Stream is a throughput.
type Stream struct {
	System    string    `json:"system"`
	Op        Op        `json:"op"` // ZeroRead or StoredRead
	Order     Order     `json:"order"`
	Placement Placement `json:"placement"`
	Cluster   int       `json:"cluster_pages"` // 0: the system has no such notion
	None      string    `json:"none,omitempty"`
	Rate      Spread    `json:"bytes_per_s"` // over the rounds
	Faults    float64   `json:"faults_per_page"`
}

// Goal is a promise and how it was kept.
type Goal struct {
	Name      string    `json:"name"`
	Placement Placement `json:"placement"`
	Ratio     Spread    `json:"ratio"` // of machpager to the C floor, within each round
	Limit     float64   `json:"limit"`
	AtLeast   bool      `json:"at_least"` // the limit is the smallest ratio wanted, otherwise the largest
	Met       bool      `json:"met"`      // by the median
}

// collect makes figures of what was measured.
func (r *FaultReport) collect(groups [][]*cell) {
	for _, g := range groups {
		var ours, floor, best, copied *cell
		for _, c := range g {
			r.add(c)
			whole := c.work.Cluster*pageSize == extent
			switch {
			case len(c.value) == 0:
			case c.system == Machpager && c.work.Single:
				ours = c
			case c.system == Floor && c.work.Single:
				floor = c
			case c.system == Machpager && whole:
				best = c
			case c.system == Floor && whole:
				copied = c
			}
		}
		if ours != nil && floor != nil {
			w := ours.work
			limit := 1.1
			if w.Op == ZeroWrite { // two ioctls: no page may be writable before the page table says that it is dirty
				limit = 1.2
			}
			r.Goals = append(r.Goals, atMost(string(w.Op)+" p50", w.Placement, ratios(ours.value, floor.value), limit),
				atMost(string(w.Op)+" p99", w.Placement, ratios(ours.p99, floor.p99), 2))
		}
		if best != nil && copied != nil && best.work.Order == Sequential && best.work.Op == StoredRead {
			g := atMost("sequential stored stream by 512 pages", best.work.Placement, ratios(best.value, copied.value), 1.5)
			g.AtLeast, g.Met = true, g.Ratio.Median >= g.Limit
			r.Goals = append(r.Goals, g)
		}
	}
}

func atMost(name string, p Placement, ratios []float64, limit float64) Goal {
	s := spread(ratios)
	return Goal{Name: name, Placement: p, Ratio: s, Limit: limit, Met: s.Median <= limit}
}

func (r *FaultReport) add(c *cell) {
	w := c.work
	faults := float64(c.faults) / float64(max(1, c.pages))
	if w.Single {
		l := Latency{System: c.system, Op: w.Op, Placement: w.Placement, None: c.none, Faults: faults}
		if c.none == "" {
			l.P50, l.P99, l.Pooled = spread(c.value), spread(c.p99), distribution(c.hist)
		}
		r.Latency = append(r.Latency, l)
		return
	}
	s := Stream{System: c.system, Op: w.Op, Order: w.Order, Placement: w.Placement, Cluster: w.Cluster, None: c.none, Faults: faults}
	if c.none == "" {
		s.Rate = spread(c.value)
	}
	r.Streams = append(r.Streams, s)
}

// Met reports whether all goals were met.
func (r *FaultReport) Met() bool {
	for _, g := range r.Goals {
		if !g.Met {
			return false
		}
	}
	return true
}

// WriteJSON writes the report for machines, indented.
func (r *FaultReport) WriteJSON(w io.Writer) error { return writeJSON(w, r) }

func writeJSON(w io.Writer, report any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "\t")
	return e.Encode(report)
}

// judged is how a goal's limit and its verdict are written.
func judged(atLeast, met bool) (sign, verdict string) {
	sign, verdict = "<=", "missed"
	if atLeast {
		sign = ">="
	}
	if met {
		verdict = "met"
	}
	return sign, verdict
}

// WriteTable writes the report for people.
func (r *FaultReport) WriteTable(w io.Writer) error {
	b := new(strings.Builder)
	fmt.Fprintf(b, "%s %d rounds, %.0f s.\n", r.Machine, r.Options.Rounds, r.Seconds)
	for _, p := range r.Options.Placements {
		fmt.Fprintf(b, "\nOne page, %s: p50 in us (smallest to largest of the rounds), p99; %d pages a round in random order\n\n", p, r.Options.Pages)
		r.latencies(b, p)
	}
	for _, p := range r.Options.Placements {
		for _, op := range []Op{ZeroRead, StoredRead} {
			for _, o := range []Order{Sequential, Random} {
				fmt.Fprintf(b, "\n%s %s, %s: GB/s (smallest to largest of the rounds) by pages per answer; %d MiB a round\n\n",
					strings.ToUpper(string(o[:1]))+string(o[1:]), op, p, r.Options.Stream>>20)
				r.streams(b, p, op, o)
			}
		}
	}
	if len(r.Goals) > 0 {
		fmt.Fprintf(b, "\nGoals: machpager / C floor, median of the rounds (smallest to largest)\n\n")
		t := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
		for _, g := range r.Goals {
			sign, verdict := judged(g.AtLeast, g.Met)
			fmt.Fprintf(t, "%s\t%s\t%s\t%.2f (%.2f to %.2f)\t%s %.2g\n", verdict, g.Placement, g.Name, g.Ratio.Median, g.Ratio.Min, g.Ratio.Max, sign, g.Limit)
		}
		t.Flush()
	}
	r.notes(b)
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *FaultReport) latencies(b *strings.Builder, p Placement) {
	t := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
	defer t.Flush()
	for _, op := range Ops {
		fmt.Fprintf(t, "\t%s", op)
	}
	fmt.Fprintln(t)
	for _, s := range r.Options.Systems {
		row, some := s, false
		for _, op := range Ops {
			text := "-"
			for _, l := range r.Latency {
				if l.System == s && l.Op == op && l.Placement == p && l.None == "" {
					text, some = fmt.Sprintf("%s (%s to %s), %s", us(l.P50.Median), us(l.P50.Min), us(l.P50.Max), us(l.P99.Median)), true
				}
			}
			row += "\t" + text
		}
		if some {
			fmt.Fprintln(t, row)
		}
	}
}

func (r *FaultReport) streams(b *strings.Builder, p Placement, op Op, o Order) {
	t := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
	defer t.Flush()
	columns := append([]int{0}, r.Options.Clusters...)
	for _, n := range columns {
		if n == 0 {
			fmt.Fprint(t, "\tany")
		} else {
			fmt.Fprintf(t, "\t%d", n)
		}
	}
	fmt.Fprintln(t)
	for _, s := range r.Options.Systems {
		row, some := s, false
		for _, n := range columns {
			text := "-"
			for _, x := range r.Streams {
				if x.System == s && x.Op == op && x.Order == o && x.Placement == p && x.Cluster == n && x.None == "" {
					text, some = fmt.Sprintf("%s (%s to %s)", gb(x.Rate.Median), gb(x.Rate.Min), gb(x.Rate.Max)), true
				}
			}
			row += "\t" + text
		}
		if some {
			fmt.Fprintln(t, row)
		}
	}
}

// notes says what was left out, once per system.
func (r *FaultReport) notes(b *strings.Builder) {
	measured := map[string]bool{}
	why := map[string]string{}
	for _, l := range r.Latency {
		measured[l.System] = measured[l.System] || l.None == ""
		why[l.System] = l.None
	}
	for _, s := range r.Streams {
		measured[s.System] = measured[s.System] || s.None == ""
	}
	for _, s := range r.Options.Systems {
		if !measured[s] {
			fmt.Fprintf(b, "\n%s: not measured: %s\n", s, why[s])
		}
	}
}

func us(ns float64) string { return fmt.Sprintf("%.2f", ns/1e3) }

func gb(rate float64) string { return fmt.Sprintf("%.2f", rate/1e9) }
