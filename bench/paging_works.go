//go:build linux

package bench

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Work is a kind of work on memory that does not fit, after those of UMap's benchmarks.
type Work string

// The works. Each begins with everything in the store. The first six run over all sizes.
const (
	SeqRead    Work = "sequential read"
	SeqWrite   Work = "sequential write"
	SeqUpdate  Work = "sequential read-modify-write"
	RandRead   Work = "random read"
	RandWrite  Work = "random write"
	RandUpdate Work = "random read-modify-write"
	Sort       Work = "sort"                 // 64-bit numbers in place, twice the budget
	Search     Work = "breadth-first search" // in an R-MAT graph of twice the budget
	Churn      Work = "churn"                // a hot set of half the budget, while a scan goes through 3.5 budgets beside it

	// On one CPU, for goals.
	single  Work = "single"   // the time of random faults with evictions, as a multiple of that without
	pageOut Work = "page-out" // of dirty pages
)

// Works are all works, but those for goals alone.
var Works = []Work{SeqRead, SeqWrite, SeqUpdate, RandRead, RandWrite, RandUpdate, Sort, Search, Churn}

// swept reports whether w runs over all sizes.
func (w Work) swept() bool { return slices.Index(Works, w) < 6 }

// times is the size of the memory that w needs, in budgets, unless it is swept.
func (w Work) times() int {
	if w == Sort || w == Search {
		return 2
	}
	return 4
}

// worker does one work once.
type worker struct {
	mem      []byte
	contents *contents
	memory   pagedMemory
	budget   int // pages
	random   *rand.Rand
	graph    graphSpec

	finish func() error // checks what was not checked within the time, where the memory has not the contents any more; nil: nothing
	bytes  int64        // that were gone through
	time   int64        // ns, if not that of the whole body; 0
	value  float64

	scanned int // by churn
}

// prepare makes everything ready, and returns what is to be measured.
func (w *worker) prepare(work Work) (body func() error, err error) {
	if err := w.memory.advise(work == RandRead || work == RandWrite || work == RandUpdate || work == single); err != nil {
		return nil, err
	}
	read := func(p int) error { return w.contents.check(w.mem, p) }
	write := func(p int) error { w.contents.write(w.mem, p); return nil }
	update := func(p int) error { return w.contents.update(w.mem, p) }
	switch work {
	case SeqRead:
		body = w.sequential(read)
	case SeqWrite:
		body = w.sequential(write)
	case SeqUpdate:
		body = w.sequential(update)
	case RandRead:
		return w.randomly(read)
	case RandWrite:
		return w.randomly(write)
	case RandUpdate:
		return w.randomly(update)
	case Sort:
		return w.sort()
	case Search:
		return w.search()
	case Churn:
		if err := w.memory.cold(); err != nil {
			return nil, err
		}
		return func() error { return w.churn(w.pages() - w.budget/2) }, w.churn(churnWarm * w.budget)
	case single:
		body = w.single
	case pageOut:
		return w.pageOut()
	default:
		return nil, fmt.Errorf("unknown work %q", work)
	}
	return body, w.memory.cold()
}

func (w *worker) pages() int { return len(w.mem) / pageSize }

func (w *worker) sequential(touch func(int) error) func() error {
	return func() error {
		for p := range w.pages() {
			if err := touch(p); err != nil {
				return err
			}
		}
		w.bytes = int64(len(w.mem))
		return nil
	}
}

// randomly touches as many pages as the budget has, after as many that are not measured: the memory is full then.
func (w *worker) randomly(touch func(int) error) (func() error, error) {
	some := func() error {
		for range w.budget {
			if err := touch(w.random.IntN(w.pages())); err != nil {
				return err
			}
		}
		w.bytes = int64(w.budget) * pageSize
		return nil
	}
	if err := w.memory.cold(); err != nil {
		return nil, err
	}
	return some, some()
}

// sort sorts random numbers.
func (w *worker) sort() (func() error, error) {
	v := words(w.mem)
	count := func() (sum, mix uint64) {
		for _, x := range v {
			sum += x
			mix += x * x >> 7 * stampStep
		}
		return sum, mix
	}
	for i := range v {
		v[i] = w.random.Uint64()
	}
	sum, mix := count()
	if err := w.memory.cold(); err != nil {
		return nil, err
	}
	w.finish = func() error {
		for i := 1; i < len(v); i++ {
			if v[i-1] > v[i] {
				return wrongf("sort: number %d is larger than the next", i-1)
			}
		}
		if s, m := count(); s != sum || m != mix {
			return wrongf("sort: what is sorted is not what was there before")
		}
		return nil
	}
	return func() error {
		slices.Sort(v)
		w.bytes = int64(len(w.mem))
		return nil
	}, nil
}

// search searches the graph. Its vertices' marks are not in the memory.
func (w *worker) search() (func() error, error) {
	if err := w.graph.load(w.mem); err != nil {
		return nil, err
	}
	return func() error {
		sum, followed := w.graph.in(w.mem).search(w.graph.Root)
		if sum != w.graph.Sum {
			return wrongf("breadth-first search: the distances add up to %#x instead of %#x", sum, w.graph.Sum)
		}
		w.bytes = followed * 4
		return nil
	}, w.memory.cold()
}

const (
	churnBatch = 64 // touches of each of the two threads between two meetings
	churnWarm  = 24 // budgets that are scanned before anything counts
)

// churn reads n of the cold pages, round and round, in one thread, and touches as many hot ones at random in another, of which it writes a quarter.
// value is the fraction of the hot touches that faulted.
func (w *worker) churn(n int) error {
	hot := w.budget / 2
	turns, failed := make(chan struct{}, 4), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		failed <- w.touchHot(hot, turns)
	}()
	for i := range n {
		if i%churnBatch == 0 {
			select {
			case turns <- struct{}{}:
			case err := <-failed:
				return err
			}
		}
		if err := w.contents.check(w.mem, hot+(w.scanned+i)%(w.pages()-hot)); err != nil {
			close(turns)
			return errors.Join(err, <-failed)
		}
	}
	close(turns)
	w.scanned += n
	w.bytes = int64(2*n) * pageSize
	return <-failed
}

func (w *worker) touchHot(hot int, turns <-chan struct{}) error {
	var faults, touches int64
	for range turns {
		before := threadFaults()
		for range churnBatch {
			p := w.random.IntN(hot)
			var err error
			if w.random.IntN(4) == 0 {
				err = w.contents.update(w.mem, p)
			} else {
				err = w.contents.check(w.mem, p)
			}
			if err != nil {
				return err
			}
		}
		faults += threadFaults() - before
		touches += churnBatch
	}
	w.value = float64(faults) / float64(max(1, touches))
	return nil
}

func threadFaults() int64 {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_THREAD, &u) // cannot fail
	return u.Minflt + u.Majflt
}

// single touches pages in random order, none twice: a quarter of the budget while there is room, and later as many budgets as one while each needs an
// eviction. value is the mean time of the latter by that of the former.
func (w *worker) single() error {
	pages := w.random.Perm(w.pages())
	touch := func(n int) (mean float64, err error) {
		begin := time.Now()
		for _, p := range pages[:n] {
			if err := w.contents.check(w.mem, p); err != nil {
				return 0, err
			}
		}
		pages = pages[n:]
		w.bytes += int64(n) * pageSize
		return float64(time.Since(begin)) / float64(n), nil
	}
	alone, err := touch(w.budget / 4)
	if err != nil {
		return err
	}
	if _, err := touch(w.budget); err != nil {
		return err
	}
	evicting, err := touch(w.budget)
	w.value = evicting / alone
	w.time = int64(alone)
	return err
}

// pageOut writes three quarters of a budget, and has it paged out.
func (w *worker) pageOut() (func() error, error) {
	if err := w.memory.cold(); err != nil {
		return nil, err
	}
	n := w.budget * 3 / 4
	for p := range n {
		w.contents.write(w.mem, p)
	}
	return func() error {
		w.bytes = int64(n) * pageSize
		return w.memory.cold()
	}, nil
}
