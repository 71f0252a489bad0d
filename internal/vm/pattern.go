package vm

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"machpager/internal/policy"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

const (
	// budgetShare of all frames is the most that one read-ahead may take.
	budgetShare = 8
	// mapAhead and writeAhead bound, in pages, what is mapped or made writable ahead of a stream of minor or write-protect faults. What is made writable for nothing is
	// stored for nothing, so that window is small.
	mapAhead   = 64
	writeAhead = 16
	// maxAdvised bounds the ranges of a mapping that have advice of their own.
	maxAdvised = 256
)

// pattern is what a mapping learns from its faults, and what it was advised. The fault reader alone uses the read-aheads.
type pattern struct {
	mu     sync.Mutex
	ranges atomic.Pointer[[]advised] // written under mu; sorted, the whole mapping
	minor  *policy.ReadAhead         // of minor faults
	write  *policy.ReadAhead         // of write-protect faults
}

// advised is a range of pages with advice of its own.
type advised struct {
	a, b  int64
	ahead *policy.ReadAhead // of absent pages
}

func (t *pattern) init(o *Object) {
	t.ranges.Store(&[]advised{{0, o.npages(), policy.NewReadAhead(o.extentPages())}})
	t.minor, t.write = policy.NewReadAhead(mapAhead), policy.NewReadAhead(writeAhead)
}

func (t *pattern) at(p int64) *policy.ReadAhead {
	r := *t.ranges.Load()
	for i := range r {
		if p < r[i].b {
			return r[i].ahead
		}
	}
	return r[len(r)-1].ahead
}

// ahead takes the pages to be asked for together with p, which the caller has made Requested: as the object's cluster size or the pattern of faults says, no more
// than the manager takes, than frames are to be had, or than may be kept of the budget. stream: the pattern says that they will be used, and nobody else sees
// what is made dirty for nothing.
func (m *Mapping) ahead(p int64, f faulter) (a, b int64, stream bool) {
	o := m.obj
	if f.retry {
		return p, p + 1, false
	}
	limit := max(int64(1), o.allowance()/budgetShare>>o.shift)
	if n := o.attrs.Load().ClusterSize; n != 0 {
		limit = min(limit, max(1, n>>o.shift))
	}
	if m.task.yields(f.start) {
		limit = min(limit, max(1, o.extentPages()/lightAhead))
	}
	if o.cluster != 0 {
		c := o.cluster
		for c > limit {
			c /= 2
		}
		lo, hi := m.window(p, c)
		a, b = o.extend(p, lo, hi)
		return a, b, false
	}
	ra := m.pattern.at(p)
	w := ra.Fault(p)
	o.dropBehind(w)
	if w.N == 1 {
		return p, p + 1, false
	}
	first, last := m.pages()
	lo, hi := max(w.First, first, p-limit+1), min(w.First+w.N, last, p+limit)
	a, b = o.extend(p, lo, hi)
	ra.Asked(b - a)
	if f.ev == page.FaultRead && (b == w.First+w.N || w.First < p && a == w.First) {
		m.goOn(p, w, 1)
	}
	return a, b, o.temporary()
}

// window is the aligned run of c pages around p that m maps.
func (m *Mapping) window(p, c int64) (lo, hi int64) {
	a, b := m.pages()
	lo = p &^ (c - 1)
	return max(lo, a), min(lo+c, b)
}

// around takes Busy on the resident neighbours of p that are to be mapped with it.
func (m *Mapping) around(p int64, f faulter) (a, b int64) {
	o := m.obj
	a, b = p, p+1
	if f.retry {
		return a, b
	}
	var lo, hi int64
	if o.cluster != 0 {
		lo, hi = m.window(p, o.cluster)
	} else {
		if m.pattern.at(p).Advice() == policy.Random {
			return a, b
		}
		w := m.pattern.minor.Fault(p)
		first, last := m.pages()
		lo, hi = max(w.First, first), min(w.First+w.N, last)
	}
	take := func(q int64) bool {
		_, _, eff := o.step(q, page.Around)
		return eff == page.ContinueWP
	}
	for b < hi && take(b) {
		b++
	}
	for a > lo && take(a-1) {
		a--
	}
	if o.cluster == 0 {
		m.pattern.minor.Asked(b - a)
	}
	return a, b
}

// dirtyAhead makes, of a temporary object (what is made dirty for nothing must not be written over a file), resident pages behind p Dirty and Busy, when the write-protect faults are a stream upwards, and returns their end.
func (m *Mapping) dirtyAhead(p int64, f faulter) (end int64) {
	o := m.obj
	end = p + 1
	if f.retry || o.cluster != 0 || !o.temporary() || m.pattern.at(p).Advice() == policy.Random {
		return end
	}
	w := m.pattern.write.Fault(p)
	_, last := m.pages()
	for hi := min(w.First+w.N, last); end < hi && o.residentFree(end); end++ {
		_, _, eff := o.step(end, page.FaultWP)
		if eff == page.Request {
			o.end(end, page.Abandon) // evicted in between
		}
		if eff != page.Unprotect {
			break
		}
	}
	m.pattern.write.Asked(end - p)
	return end
}

// Advice is how a range will be used (Mach: vm_behavior_set, Linux: madvise(2)).
type Advice uint8

// The advice there is. The first four stay with the range, the others do something once.
const (
	Normal Advice = iota
	Random
	Sequential
	ReverseSequential
	WillNeed // read ahead, in the background, as far as there are frames
	DontNeed // these pages go first
)

// Advise takes advice on the bytes [off, off+n) of the mapping, from its beginning.
func (m *Mapping) Advise(off, n int64, advice Advice) error {
	o := m.obj
	if off < 0 || n < 0 || off > m.size || n > m.size-off || advice > DontNeed {
		return fmt.Errorf("advise: bytes %d to %d of a mapping of %d, advice %d: %w", off, off+n, m.size, advice, emm.InvalidArgument)
	}
	if n == 0 {
		return nil
	}
	a, b := (m.off+off)>>o.shift, (m.off+off+n+o.pageSize-1)>>o.shift
	switch advice {
	case WillNeed:
		return m.willNeed(a, b)
	case DontNeed:
		o.cold(a, b)
		return nil
	}
	return m.pattern.set(o, a, b, policy.Advice(advice))
}

// set gives [a, b) advice of its own.
func (t *pattern) set(o *Object, a, b int64, advice policy.Advice) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []advised
	put := func(x advised) {
		if x.a < x.b {
			out = append(out, x)
		}
	}
	fresh := advised{a, b, policy.NewReadAhead(o.extentPages())}
	fresh.ahead.SetAdvice(advice)
	for _, r := range *t.ranges.Load() {
		if r.b <= a || b <= r.a {
			put(r)
			continue
		}
		put(advised{r.a, min(r.b, a), r.ahead})
		rest := advised{max(r.a, b), r.b, r.ahead}
		if r.a < a && rest.a < rest.b { // two pieces must not share what the reader learns
			rest.ahead = policy.NewReadAhead(o.extentPages())
			rest.ahead.SetAdvice(r.ahead.Advice())
		}
		put(rest)
	}
	out = append(out, fresh)
	slices.SortFunc(out, func(x, y advised) int { return int(x.a - y.a) })
	if len(out) > maxAdvised {
		return fmt.Errorf("advise: more than %d ranges with advice of their own: %w", maxAdvised, emm.ResourceShortage)
	}
	t.ranges.Store(&out)
	return nil
}

// willNeed asks for absent pages in the background.
func (m *Mapping) willNeed(a, b int64) error {
	o := m.obj
	if !m.gate.enter() {
		return fmt.Errorf("advise: the mapping is gone: %w", emm.InvalidAddress)
	}
	if !o.gate.enter() {
		m.gate.leave()
		return fmt.Errorf("advise: %w", emm.InvalidObject)
	}
	o.vm.bg.Go(func() {
		defer m.gate.leave()
		defer o.gate.leave()
		ctx, cancel := o.gate.bound(o.vm.ctx, emm.InvalidObject)
		defer cancel()
		ctx, cancel = m.gate.bound(ctx, emm.InvalidAddress)
		defer cancel()
		step := o.extentPages()
		for a < b && ctx.Err() == nil {
			if low, _ := o.vm.water(); o.vm.freeFrames() <= low {
				return // not at the cost of what is resident
			}
			var asked asking
			end := min(b, (a+step)&^(step-1))
			for p := a; p < end; {
				if o.word(p).State() != page.Absent {
					p++
					continue
				}
				p += max(1, m.askRun(p, end, &asked, mark{}))
			}
			if waitFor(ctx, &asked.wg) != nil {
				return
			}
			a = end
		}
	})
	return nil
}
