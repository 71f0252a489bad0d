//go:build linux

package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

// ErrOverBudget says that more was resident, as the kernel counts, than the pager's budget allows.
var ErrOverBudget = errors.New("more was resident than the budget allows")

// SortOptions for Sort. nil and zero values mean the defaults.
type SortOptions struct {
	File     string    // what to sort; "": generated records
	Size     int64     // bytes to generate if there is no File; 0: 1 GiB
	Record   int       // bytes of a record; 0: 100
	Key      int       // bytes at the beginning of a record to sort by; 0: 10, or the record if that is smaller
	Lines    bool      // sort lines of text by all their bytes instead
	Resident int64     // bytes that the pager may keep in memory; 0: 64 MiB
	Socket   string    // of a pager that runs already; "": start one
	Dir      string    // where the paging file of a pager of our own goes; "": os.TempDir()
	Workers  int       // goroutines; 0: GOMAXPROCS
	NoPlain  bool      // do not sort in plain memory to compare
	Out      io.Writer // the report, as text, while it goes; nil: none
	Progress bool      // Out is a terminal: show lines that change
}

// SortStep is one row of the demonstration.
type SortStep struct {
	What    string        `json:"what"`
	Counts  Counts        `json:"counts"` // as the pager counts, both regions
	Bytes   int64         `json:"bytes"`
	Elapsed time.Duration `json:"elapsed_ns"`
	Maps    [2]string     `json:"maps"` // of the pages of both regions after it: see drawMap
}

// SortResult is what Sort found.
type SortResult struct {
	File        string        `json:"file,omitempty"` // "": generated
	Size        int64         `json:"size_bytes"`
	Lines       bool          `json:"lines"`
	Record      int           `json:"record_bytes,omitempty"`
	Key         int           `json:"key_bytes,omitempty"`
	Records     int64         `json:"records"`
	Workers     int           `json:"workers"`
	Runs        int           `json:"runs"`
	Passes      int           `json:"passes"` // of the merge: each reads and writes all
	Pager       region.Info   `json:"pager"`  // at the start
	Steps       []SortStep    `json:"steps"`
	Elapsed     time.Duration `json:"elapsed_ns"` // of the sort itself: runs and merge
	Budget      int64         `json:"budget_bytes"`
	MaxResident int64         `json:"max_kernel_resident_bytes"` // the most that the kernel counted
	Samples     int           `json:"samples"`                   // how often it was asked
	InputSum    string        `json:"input_sum"`                 // of the multiset of records, from what was read or generated
	OutputSum   string        `json:"output_sum"`                // the same, from the sorted memory
	Sorted      bool          `json:"sorted"`                    // each key is not less than the one before
	Plain       *PlainSort    `json:"plain"`                     // nil: not compared
	OK          bool          `json:"ok"`                        // nothing differs, and the limit held
}

// PlainSort is the same sort in plain memory.
type PlainSort struct {
	Elapsed time.Duration `json:"elapsed_ns"`
	Equal   bool          `json:"equal"` // byte for byte
}

// Sort sorts records in two regions that are together much larger than what the pager may keep in memory: parts that fit are sorted from one into the other, then
// the runs so made are merged back. It checks the order, a checksum of the multiset of records, and, where there is memory for that, every byte against the same
// sort in plain memory. Meanwhile it asks again and again what is resident. The result is given as far as there is one, also with an error: ErrDiffers for any
// difference, ErrOverBudget.
func Sort(ctx context.Context, o *SortOptions) (*SortResult, error) {
	if o == nil {
		o = &SortOptions{}
	}
	j := &job{o: *o, res: &SortResult{}}
	err := j.prepare()
	if err == nil {
		err = j.start(ctx)
	}
	if err == nil {
		err = j.play(ctx)
	}
	if cerr := j.close(); err == nil {
		err = cerr
	}
	if err != nil {
		return j.res, fmt.Errorf("demo sort: %w", err)
	}
	return j.res, nil
}

// job is one run of Sort.
type job struct {
	format
	o       SortOptions
	res     *SortResult
	workers int
	part    int64 // bytes of a run: all workers' parts take a third of the budget, to be read, and what they write goes
	budget  int64
	pager   *region.Pager
	from    *memory // the input; after the sort, its result
	to      *memory

	mu      sync.Mutex   // of what workers add to in common
	done    atomic.Int64 // bytes of the step
	total   int64        // of the step
	step    string
	began   time.Time
	before  Counts
	drawn   int  // lines on the terminal that change
	quiet   bool // the step works on plain memory
	sampler *sampler
}

// prepare fills in defaults and looks at the file.
func (j *job) prepare() error {
	o, r := &j.o, j.res
	for _, d := range []struct {
		value *int
		unset int
	}{{&o.Record, 100}, {&o.Workers, runtime.GOMAXPROCS(0)}} {
		if *d.value == 0 {
			*d.value = d.unset
		}
	}
	if o.Key == 0 {
		o.Key = min(10, o.Record)
	}
	if o.Size == 0 {
		o.Size = 1 << 30
	}
	if o.Resident == 0 {
		o.Resident = 64 << 20
	}
	switch {
	case o.Record < 0 || o.Key < 0 || o.Key > o.Record || o.Record > 1<<20:
		return fmt.Errorf("records of %d bytes, keys of %d: want 1 to 1048576 bytes, and keys no longer than records: %w", o.Record, o.Key, emm.InvalidArgument)
	case o.Size < 0 || o.Workers < 0:
		return fmt.Errorf("%d bytes, %d workers: %w", o.Size, o.Workers, emm.InvalidArgument)
	}
	j.format = format{lines: o.Lines, record: o.Record, key: o.Key}
	if o.Lines {
		j.record, j.key = 0, 0
	}
	r.Lines, r.Record, r.Key, r.Workers = o.Lines, j.record, j.key, o.Workers
	j.workers = o.Workers
	if o.File == "" {
		r.Size = o.Size
		if !o.Lines {
			r.Size = max(1, o.Size/int64(o.Record)) * int64(o.Record)
		}
		return nil
	}
	var err error
	if r.File, err = filepath.Abs(o.File); err != nil {
		return err
	}
	f, err := os.Open(r.File)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	r.Size = st.Size()
	switch {
	case !st.Mode().IsRegular() || r.Size == 0:
		return fmt.Errorf("sort %s: want a regular file that is not empty", r.File)
	case o.Lines:
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, r.Size-1); err != nil {
			return err
		}
		if last[0] != '\n' {
			r.Size++
		}
	case r.Size%int64(o.Record) != 0:
		return fmt.Errorf("sort %s: its %d bytes are no whole number of records of %d bytes (--record, or --lines for text)", r.File, r.Size, o.Record)
	}
	return nil
}

// start reaches the pager and makes the regions.
func (j *job) start(ctx context.Context) (err error) {
	if j.o.Socket == "" {
		j.pager, err = spawn.Start(ctx, &spawn.Options{Resident: j.o.Resident, Dir: j.o.Dir})
	} else {
		j.pager, err = region.Dial(ctx, j.o.Socket, nil)
	}
	if err != nil {
		return err
	}
	if j.res.Pager, err = j.pager.Info(ctx); err != nil {
		return err
	}
	j.budget = j.res.Pager.Budget
	j.res.Budget = j.budget
	j.part = max(j.budget/3/int64(j.workers), 1<<12)
	if j.from, err = regionMemory(ctx, j.pager, j.res.Size); err != nil {
		return err
	}
	j.to, err = regionMemory(ctx, j.pager, j.res.Size)
	return err
}

// play is the demonstration itself.
func (j *job) play(ctx context.Context) error {
	j.sampler = startSampler(ctx, j.pager)
	defer j.sampler.stop()
	j.heading()
	input, err := j.load(ctx, j.from)
	if err != nil {
		return err
	}
	j.res.Records, j.res.InputSum = input.Records, input.String()
	result, err := j.sort(ctx, j.from, j.to, &j.res.Elapsed)
	if err != nil {
		return err
	}
	if result == j.to {
		j.from, j.to = j.to, j.from
	}
	plain, err := j.plain(ctx, input)
	if plain != nil {
		defer plain.close()
	}
	if err != nil {
		return err
	}
	output, err := j.verify(ctx, plain)
	if err != nil {
		return err
	}
	r := j.res
	r.OutputSum = output.String()
	j.sampler.stop()
	r.MaxResident, r.Samples = j.sampler.most, j.sampler.n
	r.Budget = max(r.Budget, j.sampler.budget)
	held := r.MaxResident <= r.Budget
	r.OK = r.Sorted && output == input && held && (r.Plain == nil || r.Plain.Equal)
	j.verdict(output == input, held)
	switch {
	case !held:
		return fmt.Errorf("%d bytes of %d: %w", r.MaxResident, r.Budget, ErrOverBudget)
	case !r.OK:
		return ErrDiffers
	}
	return j.sampler.err
}

// sort sorts the contents of from and returns the memory that the result is in.
func (j *job) sort(ctx context.Context, from, to *memory, took *time.Duration) (*memory, error) {
	size := int64(len(from.bytes))
	began := time.Now()
	var runs []run
	err := j.phase(ctx, "sort runs", size, func() (err error) {
		runs, err = j.makeRuns(ctx, from, to, j.cuts(from.bytes, j.part))
		return err
	})
	if err != nil {
		return nil, err
	}
	j.res.Runs = len(runs)
	var result *memory
	err = j.phase(ctx, "merge", size, func() (err error) {
		result, err = j.mergeAll(ctx, to, from, runs)
		return err
	})
	*took = time.Since(began)
	return result, err
}

// load fills memory with the input, and computes its multiset from what came, not from memory.
func (j *job) load(ctx context.Context, m *memory) (sum multiset, err error) {
	size := int64(len(m.bytes))
	if j.res.File == "" {
		g := generator{j.format, 1}
		parts := (size-1)/g.partSize() + 1
		err = j.phase(ctx, "generate", size, func() error {
			if err := m.advise(ctx, 0, size, region.Sequential); err != nil {
				return err
			}
			return j.each(ctx, int(parts), func(ctx context.Context, i int, _ *[]entry) error {
				dst := m.bytes[int64(i)*g.partSize() : min(size, int64(i+1)*g.partSize())]
				s := g.part(int64(i), dst)
				j.mu.Lock()
				sum.join(s)
				j.mu.Unlock()
				j.done.Add(int64(len(dst)))
				return ctx.Err()
			})
		})
		return sum, err
	}
	f, err := os.Open(j.res.File)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	l := loader{format: j.format}
	err = j.phase(ctx, "read file", size, func() error {
		if err := m.advise(ctx, 0, size, region.Sequential); err != nil {
			return err
		}
		return region.Guard(func() error {
			return l.copy(m.bytes, f, func(n int) error {
				j.done.Add(int64(n))
				return ctx.Err()
			})
		})
	})
	return l.m, err
}

// plain does the same sort in plain memory, if there is enough of it: nil otherwise.
func (j *job) plain(ctx context.Context, want multiset) (*memory, error) {
	if j.o.NoPlain || !fits(2*j.res.Size) {
		return nil, nil
	}
	j.quiet = true
	defer func() { j.quiet = false }()
	a, err := plainMemory(j.res.Size)
	if err != nil {
		return nil, err
	}
	b, err := plainMemory(j.res.Size)
	if err != nil {
		a.close()
		return nil, err
	}
	j.res.Plain = &PlainSort{}
	runs, passes := j.res.Runs, j.res.Passes
	got, err := j.load(ctx, a)
	result := a
	if err == nil && got != want {
		err = fmt.Errorf("the input is another one when it is read again: %w", ErrDiffers)
	}
	if err == nil {
		result, err = j.sort(ctx, a, b, &j.res.Plain.Elapsed)
	}
	j.res.Runs, j.res.Passes = runs, passes
	if err != nil {
		return nil, errors.Join(err, a.close(), b.close())
	}
	other := a
	if result == a {
		other = b
	}
	return result, other.close()
}

// fits reports whether n bytes of memory are available, and as much again for everybody else.
func fits(n int64) bool {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		var kb int64
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kb); err == nil {
			return n <= kb<<10/2
		}
	}
	return false
}

// verify reads the result from beginning to end: its order, its multiset, and whether it is what plain has.
func (j *job) verify(ctx context.Context, plain *memory) (sum multiset, err error) {
	mem := j.from.bytes
	size := int64(len(mem))
	sorted, equal := true, true
	err = j.phase(ctx, "verify", size, func() error {
		if err := j.from.advise(ctx, 0, size, region.Sequential); err != nil {
			return err
		}
		ends := j.cuts(mem, (size-1)/int64(j.workers)+1)
		firsts, lasts := make([][]byte, len(ends)), make([][]byte, len(ends)) // keys
		err := j.each(ctx, len(ends), func(ctx context.Context, i int, _ *[]entry) error {
			var s multiset
			var last []byte
			good, same, a := true, true, int64(0)
			if i > 0 {
				a = ends[i-1]
			}
			for at, counted := a, a; at < ends[i]; {
				end := j.end(mem, at)
				record := mem[at:end]
				key := j.keyOf(record)
				s.add(record)
				if at == a {
					firsts[i] = bytes.Clone(key)
				} else if bytes.Compare(last, key) > 0 {
					good = false
				}
				same = same && (plain == nil || bytes.Equal(record, plain.bytes[at:end]))
				last, at = key, end
				if at-counted >= 1<<16 || at == ends[i] {
					j.done.Add(at - counted)
					counted = at
					if ctx.Err() != nil {
						return ctx.Err()
					}
				}
			}
			lasts[i] = bytes.Clone(last)
			j.mu.Lock()
			sum.join(s)
			sorted, equal = sorted && good, equal && same
			j.mu.Unlock()
			return nil
		})
		for i := 1; i < len(ends); i++ {
			sorted = sorted && bytes.Compare(lasts[i-1], firsts[i]) <= 0
		}
		return err
	})
	j.res.Sorted = sorted && err == nil
	if plain != nil {
		j.res.Plain.Equal = equal && err == nil
	}
	return sum, err
}

// each does f for 0 to n-1, the workers each taking the next; scratch is a worker's own. The first error ends all.
func (j *job) each(ctx context.Context, n int, f func(ctx context.Context, i int, scratch *[]entry) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(j.workers, n) {
		wg.Go(func() {
			var scratch []entry
			for i := int(next.Add(1)) - 1; i < n && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				if err := region.Guard(func() error { return f(ctx, i, &scratch) }); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// close ends the pager, if it is ours, and waits for it.
func (j *job) close() error {
	var errs []error
	for _, m := range []*memory{j.from, j.to} {
		if m != nil && j.pager != nil {
			errs = append(errs, m.close())
		}
	}
	if j.pager != nil {
		errs = append(errs, j.pager.Close())
	}
	return errors.Join(errs...)
}
