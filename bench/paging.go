//go:build linux

package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"machpager/internal/daemon"
	"machpager/region"
	"machpager/region/spawn"
)

// The systems of [Paging].
const (
	PagedMemory     = "memory"
	PagedCompressed = "compressed"
	PagedTiered     = "tiered"
	PagedFile       = "file"
	PagedFileGroup  = "file, in a group"   // the pager and the client in a memory control group of the budget: the page cache keeps nothing of the paging file
	MappedFile      = "mmap in a group"    // of a file, in such a group
	pagedOneCPU     = "memory, on one CPU" // for goals alone
)

// PagedSystems are the systems of [Paging], in the order of the report.
var PagedSystems = []string{PagedMemory, PagedCompressed, PagedTiered, PagedFile, PagedFileGroup, MappedFile}

// PagingOptions says how much [Paging] measures. nil and the zero value are the defaults.
type PagingOptions struct {
	Systems  []string  // nil: PagedSystems
	Works    []Work    // nil: Works
	Budget   int64     // bytes of memory that a system may use, a multiple of 2 MiB; 0: 16 MiB
	Scale    float64   // of the budget and all sizes; 0: 1
	Times    []int     // sizes of the memory that is worked on, in budgets; nil: 1, 2, 4, 8
	Rounds   int       // 0: 3
	Dir      string    // where files lie; "": os.TempDir()
	Progress io.Writer `json:"-"` // a line for each step goes here; nil: none
}

func (o *PagingOptions) withDefaults() (PagingOptions, error) {
	var d PagingOptions
	if o != nil {
		d = *o
	}
	def(&d.Budget, 16<<20)
	def(&d.Scale, 1)
	def(&d.Rounds, 3)
	def(&d.Dir, os.TempDir())
	d.Budget = max(extent, int64(float64(d.Budget)*d.Scale)&^(extent-1))
	if d.Systems == nil {
		d.Systems = PagedSystems
	}
	if d.Works == nil {
		d.Works = Works
	}
	if d.Times == nil {
		d.Times = []int{1, 2, 4, 8}
	}
	if d.Progress == nil {
		d.Progress = io.Discard
	}
	for _, s := range d.Systems {
		if !slices.Contains(PagedSystems, s) {
			return d, fmt.Errorf("no system %q: there are %s", s, strings.Join(PagedSystems, "; "))
		}
	}
	for _, w := range d.Works {
		if !slices.Contains(Works, w) {
			return d, fmt.Errorf("no work %q: there are %q", w, Works)
		}
	}
	if d.Rounds < 1 || d.Scale < 0 || len(d.Times) == 0 || slices.Min(d.Times) < 1 {
		return d, errors.New("rounds, scale and times must be positive")
	}
	return d, nil
}

// ErrWrong is contents that are not what was written.
var ErrWrong = errors.New("wrong contents")

// pagedSystem is a system that is ready.
type pagedSystem struct {
	name   string
	none   string // why it cannot be measured
	pager  *region.Pager
	pid    int // of the pager; 0: none
	group  *group
	client *driven
}

// pagingRun is one combination of a system and a work, and what was measured of it.
type pagingRun struct {
	system  *pagedSystem
	work    Work
	times   int
	results []pagingResult
}

// Paging measures work on memory that does not fit into the budget. ctx ends it early, with an error; ErrWrong if a byte was wrong anywhere.
func Paging(ctx context.Context, opts *PagingOptions) (_ *PagingReport, err error) {
	rep, err := paging(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("bench paging: %w", err)
	}
	return rep, nil
}

func paging(ctx context.Context, opts *PagingOptions) (_ *PagingReport, err error) {
	o, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Dir, "machpager-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	rep := &PagingReport{Machine: machine(), Options: o}
	start := time.Now()
	// The stores of all systems, and then some.
	if err := warmUp(int64(2*len(o.Systems)*slices.Max(o.Times)) * o.Budget); err != nil {
		return nil, err
	}
	var g graphSpec
	if slices.Contains(o.Works, Search) {
		if g, err = makeGraph(filepath.Join(dir, "graph"), int64(Search.times())*o.Budget); err != nil {
			return nil, err
		}
	}
	var systems []*pagedSystem
	defer func() {
		for _, s := range systems {
			err = errors.Join(err, s.stop())
		}
	}()
	names := o.Systems
	if slices.Contains(names, PagedMemory) {
		names = append(slices.Clone(names), pagedOneCPU)
	}
	for i, name := range names {
		s := &pagedSystem{name: name}
		systems = append(systems, s)
		if err := s.start(ctx, &o, dir, i); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	runs, err := runPaging(ctx, &o, systems, g)
	if err != nil {
		return nil, err
	}
	rep.Seconds = time.Since(start).Seconds()
	rep.Machine.LoadAfter = load()
	rep.collect(runs, systems)
	return rep, nil
}

// start starts what the system is made of. Where this machine does not allow it, there is no error, but s.none.
func (s *pagedSystem) start(ctx context.Context, o *PagingOptions, dir string, number int) (err error) {
	h := pagingHello{Dir: dir, Budget: o.Budget, OneCPU: s.name == pagedOneCPU}
	if s.name == PagedFileGroup || s.name == MappedFile {
		if s.group, err = newGroup(fmt.Sprintf("machpager-bench-%d-%d", os.Getpid(), number)); err != nil {
			s.none = err.Error()
			return nil
		}
		h.Group = &groupOf{s.group.dir, s.group.unified}
	}
	store := map[string]string{PagedCompressed: daemon.StoreCompressed, PagedTiered: daemon.StoreTiered, PagedFile: daemon.StoreFile,
		PagedFileGroup: daemon.StoreFile}[s.name]
	if store == "" {
		store = daemon.StoreMemory
	}
	if s.name != MappedFile {
		h.Socket = filepath.Join(dir, fmt.Sprintf("paging%d.sock", number))
		if s.pager, err = spawn.Start(ctx, &spawn.Options{Resident: o.Budget, Store: store, Dir: dir, Socket: h.Socket}); err != nil {
			return err
		}
		info, err := s.pager.Info(ctx)
		if err != nil {
			return err
		}
		s.pid, h.PID = info.PagerPID, info.PagerPID
		if s.group != nil {
			if err := s.group.join(s.pid); err != nil {
				return err
			}
		}
	}
	s.client, err = startClient(ctx, "paging", h)
	return err
}

func (s *pagedSystem) stop() error {
	var errs []error
	if s.client != nil {
		errs = append(errs, s.client.stop())
	}
	if s.pager != nil {
		errs = append(errs, s.pager.Close())
	}
	if s.group != nil {
		errs = append(errs, s.group.remove())
	}
	if s.none != "" {
		return nil // its processes were killed: that has been said
	}
	return errors.Join(errs...)
}

// do has one job done.
func (s *pagedSystem) do(j pagingJob) (r pagingResult, err error) {
	if err = s.client.call(j, &r); err == nil && r.Err.Text != "" {
		err = r.Err
		if r.Wrong {
			err = fmt.Errorf("%w: %w", ErrWrong, err)
		}
	}
	if err != nil {
		return r, fmt.Errorf("%s, %s %s of %d MiB: %w", s.name, j.Do, j.Work, j.Size>>20, err)
	}
	return r, nil
}

// runPaging lets all systems take turns with everything, in rounds.
func runPaging(ctx context.Context, o *PagingOptions, systems []*pagedSystem, g graphSpec) ([]*pagingRun, error) {
	var runs []*pagingRun
	swept := slices.DeleteFunc(slices.Clone(o.Works), func(w Work) bool { return !w.swept() })
	for _, times := range o.Times {
		part := combine(systems, swept, times)
		runs = append(runs, part...)
		if err := runPart(ctx, o, part, g, false); err != nil {
			return nil, err
		}
	}
	for _, w := range append(slices.DeleteFunc(slices.Clone(o.Works), Work.swept), single, pageOut) {
		part := combine(systems, []Work{w}, w.times())
		runs = append(runs, part...)
		if err := runPart(ctx, o, part, g, true); err != nil {
			return nil, err
		}
	}
	return runs, nil
}

// combine lists what is to be compared: works by systems.
func combine(systems []*pagedSystem, works []Work, times int) (runs []*pagingRun) {
	for _, w := range works {
		for _, s := range systems {
			if goal := w == single || w == pageOut; s.none == "" && goal == (s.name == pagedOneCPU) {
				runs = append(runs, &pagingRun{system: s, work: w, times: times})
			}
		}
	}
	return runs
}

// runPart runs what is done on memory of one size, on the same memory again and again, or, with fresh, on new one each time.
func runPart(ctx context.Context, o *PagingOptions, runs []*pagingRun, g graphSpec, fresh bool) error {
	open := map[*pagedSystem]bool{}
	shut := func(s *pagedSystem, work Work) error {
		if !open[s] {
			return nil
		}
		delete(open, s)
		_, err := s.do(pagingJob{Do: "close", Work: work})
		return err
	}
	for round := range o.Rounds {
		for i := range runs {
			r := runs[(i+round)%len(runs)]
			if r.system.none != "" {
				continue
			}
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			j := pagingJob{Do: "open", Work: r.work, Size: int64(r.times) * o.Budget, Seed: uint64(round), Graph: g}
			if r.work == Search {
				j.Size = g.size()
			}
			if !open[r.system] {
				if _, err := r.system.do(j); err != nil {
					return err
				}
				open[r.system] = true
			}
			j.Do = "run"
			result, err := r.system.do(j)
			if err != nil && r.system.group != nil && ctx.Err() == nil && !errors.Is(err, ErrWrong) { // the kernel kills in groups that are full
				r.system.none = err.Error()
				delete(open, r.system)
				continue
			}
			if err != nil {
				return err
			}
			r.results = append(r.results, result)
			fmt.Fprintf(o.Progress, "round %d of %d: %s, %d MiB, %s: %.2f s\n", round+1, o.Rounds, r.work, j.Size>>20, r.system.name, float64(result.Time)/1e9)
			if fresh {
				if err := shut(r.system, r.work); err != nil {
					return err
				}
			}
		}
	}
	for _, r := range runs {
		if err := shut(r.system, r.work); err != nil {
			return err
		}
	}
	return nil
}
