//go:build linux

package bench

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// PagingReport is what [Paging] measured.
type PagingReport struct {
	Machine Machine           `json:"machine"`
	Options PagingOptions     `json:"options"`
	Seconds float64           `json:"seconds"` // all of it took
	Runs    []PagingRun       `json:"runs"`
	None    map[string]string `json:"none,omitempty"` // systems that were not measured, and why
	Goals   []PagingGoal      `json:"goals"`
}

// PagingRun is one work of one system.
type PagingRun struct {
	System string `json:"system"`
	Work   Work   `json:"work"`
	Times  int    `json:"times"`       // the size of the memory, in budgets
	Rate   Spread `json:"bytes_per_s"` // over the rounds
	// All rounds together: of what the work went through, and what it took for that.
	Bytes   int64 `json:"bytes"`
	Faults  int64 `json:"faults"`        // that the kernel counted
	In      int64 `json:"in_bytes"`      // from the store
	Out     int64 `json:"out_bytes"`     // to the store
	Evicted int64 `json:"evicted_bytes"` // negative: unknown
	CPU     int64 `json:"pager_cpu_ns"`  // of the pager
	// Value is, of churn, the fraction of hot touches that faulted.
	Value Spread `json:"value"`
}

// PagingGoal is a promise and how it was kept.
type PagingGoal struct {
	Name    string  `json:"name"`
	Unit    string  `json:"unit"`
	Value   Spread  `json:"value"` // over the rounds
	Limit   float64 `json:"limit"`
	AtLeast bool    `json:"at_least"` // the limit is the smallest value wanted, otherwise the largest
	Met     bool    `json:"met"`      // by the median
}

// collect makes figures of what was measured.
func (r *PagingReport) collect(runs []*pagingRun, systems []*pagedSystem) {
	r.None = map[string]string{}
	for _, s := range systems {
		if s.none != "" {
			r.None[s.name] = s.none
		}
	}
	for _, run := range runs {
		if run.system.none != "" {
			continue
		}
		x := PagingRun{System: run.system.name, Work: run.work, Times: run.times}
		var rates, values, micros []float64
		for _, res := range run.results {
			rates = append(rates, float64(res.Bytes)/(float64(res.Time)/1e9))
			values = append(values, res.Value)
			micros = append(micros, float64(res.Time)/1e3)
			x.Bytes += res.Bytes
			x.Faults += res.Faults
			x.In += res.In
			x.Out += res.Out
			x.Evicted += res.Evicted
			x.CPU += res.CPU
		}
		x.Rate, x.Value = spread(rates), spread(values)
		switch {
		case x.Work == single:
			r.goal(fmt.Sprintf("random reads with eviction, by single stored-page faults (%.1f us)", spread(micros).Median), "x", values, 1.5, false)
			continue
		case x.Work == pageOut:
			r.goal("page-out of dirty pages to memory, one CPU", "GB/s", rates, 1e9, true)
			continue
		case x.Work == SeqRead && x.Times == 4 && x.System == PagedMemory:
			r.goal("sequential read of 4 x the budget, memory", "GB/s", rates, 3e9, true)
		case x.Work == SeqRead && x.Times == 4 && x.System == PagedCompressed:
			r.goal("sequential read of 4 x the budget, compressed", "GB/s", rates, 1e9, true)
		case x.Work == Churn && x.System != MappedFile:
			r.goal("touches of a hot set that fault while a scan streams past, "+x.System, "%", values, 0.01, false)
		}
		r.Runs = append(r.Runs, x)
	}
}

func (r *PagingReport) goal(name, unit string, values []float64, limit float64, atLeast bool) {
	scale := map[string]float64{"GB/s": 1e-9, "%": 100, "x": 1}[unit]
	g := PagingGoal{Name: name, Unit: unit, Value: spread(values), Limit: limit * scale, AtLeast: atLeast}
	for _, v := range []*float64{&g.Value.Median, &g.Value.Min, &g.Value.Max} {
		*v *= scale
	}
	g.Met = g.Value.Median <= g.Limit
	if atLeast {
		g.Met = g.Value.Median >= g.Limit
	}
	r.Goals = append(r.Goals, g)
}

// Met reports whether all goals were met.
func (r *PagingReport) Met() bool {
	return !slices.ContainsFunc(r.Goals, func(g PagingGoal) bool { return !g.Met })
}

// WriteJSON writes the report for machines, indented.
func (r *PagingReport) WriteJSON(w io.Writer) error { return writeJSON(w, r) }

// WriteTable writes the report for people.
func (r *PagingReport) WriteTable(w io.Writer) error {
	b := new(strings.Builder)
	fmt.Fprintf(b, "%s Budget %d MiB, %d rounds, %.0f s.\n", r.Machine, r.Options.Budget>>20, r.Options.Rounds, r.Seconds)
	for _, work := range r.Options.Works {
		if work.swept() {
			fmt.Fprintf(b, "\n%s: GB/s (smallest to largest of the rounds) by the size of the memory, in budgets\n\n", work)
			r.rates(b, work)
		}
	}
	if slices.ContainsFunc(r.Options.Works, func(w Work) bool { return !w.swept() }) {
		fmt.Fprintf(b, "\nOthers: GB/s (smallest to largest of the rounds)\n\n")
		r.others(b)
	}
	for _, work := range r.Options.Works {
		fmt.Fprintf(b, "\n%s: what it took, per MiB gone through; swept works at the largest size\n\n", work)
		r.costs(b, work)
	}
	for _, s := range r.Options.Systems {
		if why := r.None[s]; why != "" {
			fmt.Fprintf(b, "\n%s: not measured: %s\n", s, why)
		}
	}
	if len(r.Goals) > 0 {
		fmt.Fprintf(b, "\nGoals: median of the rounds (smallest to largest)\n\n")
		t := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
		for _, g := range r.Goals {
			sign, verdict := judged(g.AtLeast, g.Met)
			fmt.Fprintf(t, "%s\t%s\t%.2f (%.2f to %.2f) %s\t%s %.2g\n", verdict, g.Name, g.Value.Median, g.Value.Min, g.Value.Max, g.Unit, sign, g.Limit)
		}
		t.Flush()
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// find is the run of a system, or nil.
func (r *PagingReport) find(system string, work Work, times int) *PagingRun {
	for i, x := range r.Runs {
		if x.System == system && x.Work == work && x.Times == times {
			return &r.Runs[i]
		}
	}
	return nil
}

func rateText(x *PagingRun) string {
	if x == nil {
		return "-"
	}
	return fmt.Sprintf("%s (%s to %s)", gb(x.Rate.Median), gb(x.Rate.Min), gb(x.Rate.Max))
}

func (r *PagingReport) rates(b *strings.Builder, work Work) {
	t := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
	defer t.Flush()
	for _, n := range r.Options.Times {
		fmt.Fprintf(t, "\t%d", n)
	}
	fmt.Fprintln(t)
	for _, s := range r.measured() {
		fmt.Fprint(t, s)
		for _, n := range r.Options.Times {
			fmt.Fprintf(t, "\t%s", rateText(r.find(s, work, n)))
		}
		fmt.Fprintln(t)
	}
}

func (r *PagingReport) others(b *strings.Builder) {
	t := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
	defer t.Flush()
	works := slices.DeleteFunc(slices.Clone(r.Options.Works), Work.swept)
	for _, w := range works {
		fmt.Fprintf(t, "\t%s", w)
	}
	fmt.Fprintln(t)
	for _, s := range r.measured() {
		fmt.Fprint(t, s)
		for _, w := range works {
			fmt.Fprintf(t, "\t%s", rateText(r.find(s, w, w.times())))
		}
		fmt.Fprintln(t)
	}
}

func (r *PagingReport) costs(b *strings.Builder, work Work) {
	t := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
	defer t.Flush()
	fmt.Fprintln(t, "\tfaults\tMiB in\tMiB out\tMiB evicted\tus of the pager's CPUs")
	times := work.times()
	if work.swept() {
		times = slices.Max(r.Options.Times)
	}
	for _, s := range r.measured() {
		x := r.find(s, work, times)
		if x == nil {
			continue
		}
		n := float64(max(1, x.Bytes))
		evicted, cpu := "-", "-"
		if s != MappedFile {
			evicted, cpu = fmt.Sprintf("%.2f", float64(x.Evicted)/n), fmt.Sprintf("%.0f", float64(x.CPU)/1e3/(n/(1<<20)))
		}
		fmt.Fprintf(t, "%s\t%.1f\t%.2f\t%.2f\t%s\t%s\n", s, float64(x.Faults)/(n/(1<<20)), float64(x.In)/n, float64(x.Out)/n, evicted, cpu)
	}
}

// measured are the systems that were.
func (r *PagingReport) measured() []string {
	return slices.DeleteFunc(slices.Clone(r.Options.Systems), func(s string) bool { return r.None[s] != "" })
}
