//go:build linux

package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"

	"machpager/region"
	"machpager/region/spawn"
)

// FaultOptions says how much [Fault] measures. nil and the zero value are the defaults.
type FaultOptions struct {
	Systems    []string    // which, by name; nil: all of Systems
	Placements []Placement // nil: SameCore and Free
	Rounds     int         // that count, one more warms up; 0: 9
	Pages      int         // touched per round for latencies; 0: 1000
	Stream     int64       // bytes touched per round for throughput, rounded up to 2 MiB; 0: 64 MiB
	Clusters   []int       // pages per answer; nil: 1, 4, 16, 64, 512
	Warm       int64       // bytes of memory to touch beforehand, at most half of what is available; 0: 8 GiB; negative: none
	Dir        string      // where the file lies that is read and mapped, and the pager's; "": os.TempDir()
	Progress   io.Writer   `json:"-"` // a line per round goes here; nil: none
}

func (o *FaultOptions) withDefaults() FaultOptions {
	var d FaultOptions
	if o != nil {
		d = *o
	}
	def(&d.Rounds, 9)
	def(&d.Pages, 1000)
	def(&d.Stream, 64<<20)
	def(&d.Warm, 8<<30)
	def(&d.Dir, os.TempDir())
	d.Stream = (d.Stream + extent - 1) &^ (extent - 1)
	if d.Systems == nil {
		d.Systems = Systems
	}
	if d.Placements == nil {
		d.Placements = []Placement{SameCore, Free}
	}
	if d.Clusters == nil {
		d.Clusters = []int{1, 4, 16, 64, 512}
	}
	if d.Progress == nil {
		d.Progress = io.Discard
	}
	return d
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

func (o *FaultOptions) validate() error {
	for _, s := range o.Systems {
		if !slices.Contains(Systems, s) {
			return fmt.Errorf("no system %q: there are %s", s, strings.Join(Systems, "; "))
		}
	}
	for _, n := range o.Clusters {
		if n < 1 || n > extent/pageSize || n&(n-1) != 0 {
			return fmt.Errorf("cluster of %d pages: must be a power of two from 1 to %d", n, extent/pageSize)
		}
	}
	if o.Rounds < 1 || o.Pages < 1 || o.Stream < 1 {
		return errors.New("rounds, pages and stream must be positive")
	}
	return nil
}

// cell is one combination of a system and a workload, and what was measured of it.
type cell struct {
	system string
	work   workload
	none   string    // why it cannot be measured
	value  []float64 // per round: the median latency in ns, or bytes per s
	p99    []float64 // per round, in ns; latencies only
	faults int64     // in all rounds
	pages  int64
	hist   *hdrhistogram.Histogram
}

// cells lists all combinations, in groups of what is to be compared: all systems on one workload.
func cells(o *FaultOptions) (groups [][]*cell) {
	for _, placement := range o.Placements {
		for _, op := range Ops {
			var g []*cell
			for _, s := range o.Systems {
				if s != FloorExtents {
					g = append(g, &cell{system: s, hist: newHistogram(),
						work: workload{Op: op, Order: Random, Placement: placement, Pages: o.Pages, Cluster: 1, Single: true}})
				}
			}
			groups = append(groups, g)
		}
		for _, op := range []Op{ZeroRead, StoredRead} {
			for _, order := range []Order{Sequential, Random} {
				var g []*cell
				for _, s := range o.Systems {
					for _, n := range clusters(s, o.Clusters) {
						g = append(g, &cell{system: s,
							work: workload{Op: op, Order: order, Placement: placement, Pages: int(o.Stream / pageSize), Cluster: n}})
					}
				}
				groups = append(groups, g)
			}
		}
	}
	return groups
}

// clusters are those of all that make sense for system s.
func clusters(s string, all []int) []int {
	switch s {
	case Anon, Memfd, File:
		return []int{0}
	case Mapper:
		return []int{1}
	case FloorExtents:
		return []int{extent / pageSize}
	case FloorBlock:
		return nil
	}
	return all
}

// pagerSpare is memory that the pager gets beyond what it needs, in bytes: eviction is not what is measured here.
const pagerSpare = 256 << 20

// Fault measures what a page fault costs. It must be able to use userfaultfd. ctx ends it early, with an error.
func Fault(ctx context.Context, opts *FaultOptions) (_ *FaultReport, err error) {
	o := opts.withDefaults()
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("bench fault: %w", err)
	}
	dir, err := os.MkdirTemp(o.Dir, "machpager-bench-")
	if err != nil {
		return nil, fmt.Errorf("bench fault: %w", err)
	}
	defer os.RemoveAll(dir)
	h := hello{Warm: max(0, o.Warm), Dir: dir, Size: max(int(o.Stream), o.Pages*faultAround*pageSize)}
	if slices.ContainsFunc(o.Systems, func(s string) bool { return s == Floor || s == FloorBlock || s == FloorExtents }) {
		if h.Floor, err = compileFloor(dir); err != nil {
			return nil, fmt.Errorf("bench fault: %w", err)
		}
	}
	if slices.Contains(o.Systems, Machpager) {
		sockets, stop, serr := startPagers(ctx, &o, dir)
		defer func() { err = errors.Join(err, stop()) }()
		if serr != nil {
			return nil, fmt.Errorf("bench fault: %w", serr)
		}
		h.Pagers = sockets
	}
	rep := &FaultReport{Machine: machine(), Options: o}
	start := time.Now()
	groups := cells(&o)
	if err := runAll(ctx, &o, h, groups); err != nil {
		return nil, fmt.Errorf("bench fault: %w", err)
	}
	rep.Seconds = time.Since(start).Seconds()
	rep.Machine.LoadAfter = load()
	rep.collect(groups)
	return rep, nil
}

// startPagers starts a pager for each placement, with sockets in dir. stop ends those that were started, also beside an error.
func startPagers(ctx context.Context, o *FaultOptions, dir string) (sockets map[Placement]string, stop func() error, err error) {
	var pagers []*region.Pager
	stop = func() error {
		var errs []error
		for _, p := range pagers {
			errs = append(errs, p.Close())
		}
		return errors.Join(errs...)
	}
	sockets = map[Placement]string{}
	for i, placement := range o.Placements {
		s := filepath.Join(dir, fmt.Sprintf("pager%d.sock", i))
		p, err := spawn.Start(ctx, &spawn.Options{Resident: 2*o.Stream + pagerSpare, Store: "memory", Dir: dir, Socket: s})
		if err != nil {
			return nil, stop, err
		}
		pagers = append(pagers, p)
		sockets[placement] = s
	}
	return sockets, stop, nil
}

func runAll(ctx context.Context, o *FaultOptions, h hello, groups [][]*cell) (err error) {
	c, err := startClient(ctx, "client", h)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	for round := range o.Rounds + 1 {
		fmt.Fprintf(o.Progress, "round %d of %d\n", round, o.Rounds)
		for _, g := range groups {
			for i := range g {
				cell := g[(i+round)%len(g)]
				if cell.none != "" {
					continue
				}
				w := cell.work
				w.Seed = uint64(round)
				r, err := c.do(job{System: cell.system, Workload: w})
				if err != nil {
					return fmt.Errorf("%s, %s %s by %d pages, %s: %w", cell.system, w.Order, w.Op, w.Cluster, w.Placement, err)
				}
				if cell.none = r.None; cell.none == "" && round > 0 {
					cell.add(r)
				}
			}
		}
	}
	return nil
}

func (c *cell) add(r result) {
	c.faults += r.Faults
	c.pages += r.Bytes / pageSize
	if !c.work.Single {
		c.value = append(c.value, float64(r.Bytes)/(float64(r.Total)/1e9))
		return
	}
	for _, t := range r.Times {
		_ = c.hist.RecordValue(min(t, longest))
	}
	slices.Sort(r.Times)
	c.value = append(c.value, float64(quantile(r.Times, 0.50)))
	c.p99 = append(c.p99, float64(quantile(r.Times, 0.99)))
}

// machine describes where this runs, in general terms.
func machine() Machine {
	m := Machine{Arch: runtime.GOARCH, CPUs: runtime.NumCPU(), GoVersion: runtime.Version(), Available: available(), LoadBefore: load()}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel, _, _ = strings.Cut(unix.ByteSliceToString(u.Release[:]), "-")
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.Processor = strings.TrimSpace(value)
				break
			}
		}
		m.Virtual = strings.Contains(string(b), " hypervisor")
	}
	return m
}

// load is the load average of the last minute.
func load() (l float64) {
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		_, _ = fmt.Sscan(string(b), &l)
	}
	return l
}
