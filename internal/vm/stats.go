package vm

import (
	"math/bits"
	"sync/atomic"
	"time"

	"machpager/internal/vm/page"
)

// counters of the vm; all count events since its start.
type counters struct {
	bugs, deferred, noMemory, foreign, extents, unasked, thrownAway, notStored, scrubbed, cleanedAhead atomic.Int64
}

type objectCounters struct{ completed, returned, evicted atomic.Int64 }

type taskCounters struct{ readErrors, events, strangers atomic.Int64 }

// mappingCounters count faults by what answered them.
type mappingCounters struct {
	zeroFilled, stored, minor, writeProtect, errors, dropped atomic.Int64
	pagesIn                                                  atomic.Int64
	hist                                                     histogram
}

// Stats of a vm. Counts are since its start.
type Stats struct {
	Objects      int   `json:"objects"`
	Tasks        int   `json:"tasks"`
	Mappings     int   `json:"mappings"`
	Deferred     int64 `json:"deferred"`      // faults that found no frame or too many requests outstanding
	NoMemory     int64 `json:"no_memory"`     // fills that the kernel refused for want of memory, though frames were reserved
	Foreign      int64 `json:"foreign"`       // frames found in a file that nobody of ours put there
	Extents      int64 `json:"extents"`       // whole extents filled as one folio
	Unasked      int64 `json:"unasked"`       // pages answered that nobody had asked for
	ThrownAway   int64 `json:"thrown_away"`   // dirty pages that a task took out of its file
	NotStored    int64 `json:"not_stored"`    // pages that a manager did not store
	CleanedAhead int64 `json:"cleaned_ahead"` // dirty pages that were returned before they were victims
	Strangers    int64 `json:"strangers"`     // faults at addresses that no mapping has
	Bugs         int64 `json:"bugs"`          // broken invariants
}

// Stats counts.
func (v *VM) Stats() Stats {
	c := &v.counters
	s := Stats{Deferred: c.deferred.Load(), NoMemory: c.noMemory.Load(), Foreign: c.foreign.Load(), Extents: c.extents.Load(), Unasked: c.unasked.Load(),
		ThrownAway: c.thrownAway.Load(), NotStored: c.notStored.Load(), CleanedAhead: c.cleanedAhead.Load(), Bugs: c.bugs.Load()}
	v.mu.Lock()
	defer v.mu.Unlock()
	s.Objects, s.Tasks = len(v.objects), len(v.tasks)
	for _, t := range v.tasks {
		s.Strangers += t.stats.strangers.Load()
		t.mu.Lock()
		s.Mappings += len(t.maps)
		t.mu.Unlock()
	}
	return s
}

// ObjectStats of one object. Pages are counted by looking at all of them.
type ObjectStats struct {
	Pages                   int64 // of the object
	Resident, Dirty, Errors int64 // pages
	Mappings                int
	Returned, Evicted       int64 // pages, since its beginning
	Outstanding             int   // data requests
}

// Stats counts.
func (o *Object) Stats() ObjectStats {
	if !o.gate.enter() {
		return ObjectStats{}
	}
	defer o.gate.leave()
	s := ObjectStats{Pages: o.npages(), Mappings: len(*o.maps.Load()), Returned: o.stats.returned.Load(), Evicted: o.stats.evicted.Load()}
	s.Resident, s.Dirty, s.Errors = o.count(0, o.npages())
	o.reqMu.Lock()
	s.Outstanding = len(o.requests)
	o.reqMu.Unlock()
	return s
}

func (o *Object) count(a, b int64) (resident, dirty, errors int64) {
	o.reqMu.Lock()
	failed := len(o.reasons)
	o.reqMu.Unlock()
	if o.resident.Load() == 0 && a == 0 && b == o.npages() && failed == 0 {
		return 0, 0, 0 // a large sparse object need not be walked
	}
	walk := touched{o: o}
	for p := walk.next(a, b); p < b; p = walk.next(p+1, b) {
		switch o.word(p).State() {
		case page.Clean, page.Evicting:
			resident++
		case page.Dirty, page.Cleaning:
			resident++
			dirty++
		case page.Error:
			errors++
		}
	}
	return
}

// MappingStats of one mapping. Faults are counted once each, by what answered them.
type MappingStats struct {
	ZeroFilled   int64         `json:"zero_filled"`   // absent, never written
	Stored       int64         `json:"stored"`        // absent, supplied by the manager
	Minor        int64         `json:"minor"`         // resident, mapped already elsewhere
	WriteProtect int64         `json:"write_protect"` // first write to a clean page
	Errors       int64         `json:"errors"`        // answered with an error
	Dropped      int64         `json:"dropped"`       // messages left to who owned the page: the thread faulted again
	PagesIn      int64         `json:"pages_in"`      // pages filled through this mapping, also those nobody waited for
	P50          time.Duration `json:"p50_ns"`        // from reading the message to waking the thread
	P99          time.Duration `json:"p99_ns"`        // from reading the message to waking the thread
	Max          time.Duration `json:"max_ns"`
	Resident     int64         `json:"resident"` // pages of the mapped range
	Dirty        int64         `json:"dirty"`
}

// Stats counts.
func (m *Mapping) Stats() MappingStats {
	// Faults are counted before they are answered, but how long they took can only be known afterwards.
	for range 20 {
		if m.task == nil || !m.task.serving.Load() {
			break
		}
		time.Sleep(10 * time.Microsecond)
	}
	c := &m.stats
	s := MappingStats{ZeroFilled: c.zeroFilled.Load(), Stored: c.stored.Load(), Minor: c.minor.Load(), WriteProtect: c.writeProtect.Load(), Errors: c.errors.Load(),
		Dropped: c.dropped.Load(), PagesIn: c.pagesIn.Load(), P50: c.hist.quantile(0.50), P99: c.hist.quantile(0.99), Max: time.Duration(c.hist.max.Load())}
	if m.obj.gate.enter() {
		a, b := m.pages()
		s.Resident, s.Dirty, _ = m.obj.count(a, b)
		m.obj.gate.leave()
	}
	return s
}

func (m *Mapping) latency(start time.Time) { m.stats.hist.record(since(start)) }

// account counts a fill and the fault at need that it answers (-1: none), before a thread is woken by it: who asks right after a touch finds it counted.
func (m *Mapping) account(need, pages int64, stored bool) {
	m.stats.pagesIn.Add(pages)
	if need >= 0 {
		m.filled(stored).Add(1)
	}
}

// accounted takes back what account counted of the pages [mid, b), which could not be filled, and records how long the fault took if need was.
func (m *Mapping) accounted(r *request, need, mid, b int64, stored bool) {
	m.stats.pagesIn.Add(mid - b)
	switch {
	case need >= mid:
		m.filled(stored).Add(-1)
	case need >= 0:
		m.latency(r.f.start)
	}
}

// filled is the counter of the faults that a fill answers.
func (m *Mapping) filled(stored bool) *atomic.Int64 {
	if stored {
		return &m.stats.stored
	}
	return &m.stats.zeroFilled
}

// histogram of durations: eight buckets to each power of two nanoseconds, so a quantile is right within 12 %.
type histogram struct {
	n   [40 * 8]atomic.Int64
	max atomic.Int64
}

func (h *histogram) record(ns int64) {
	h.n[bucketOf(ns)].Add(1)
	for m := h.max.Load(); ns > m && !h.max.CompareAndSwap(m, ns); m = h.max.Load() {
	}
}

func bucketOf(ns int64) int {
	if ns < 8 {
		return int(max(0, ns))
	}
	e := bits.Len64(uint64(ns)) - 4 // ns>>e is 8 to 15
	return min(8*(e+1)+int(ns>>e)-8, 40*8-1)
}

// bucketTop is the largest duration that falls into bucket i.
func bucketTop(i int) int64 {
	if i < 8 {
		return int64(i)
	}
	e := i/8 - 1
	return int64(i%8+9)<<e - 1
}

func (h *histogram) quantile(q float64) time.Duration {
	total := int64(0)
	for i := range h.n {
		total += h.n[i].Load()
	}
	rank := int64(q*float64(total)) + 1
	for i := range h.n {
		if rank -= h.n[i].Load(); rank <= 0 {
			return time.Duration(min(bucketTop(i), h.max.Load()))
		}
	}
	return time.Duration(h.max.Load())
}
