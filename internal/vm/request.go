package vm

import (
	"slices"
	"sync"

	"machpager/internal/failpoint"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// requests are recycled: one is needed for every fault.
var requests = sync.Pool{New: func() any { return new(request) }}

// maxRun is the largest number of pages in one request: an extent of 4 KiB pages.
const maxRun = extentSize / frameSize

// request is a data_request that is out: pages [a, b) are Requested until each is answered.
type request struct {
	m      *Mapping // who asked first: contents are placed here
	a, b   int64    // immutable; pages
	need   int64    // immutable; the page a thread waits for, -1: none
	f      faulter
	write  bool                 // immutable; the thread wants to write
	stream bool                 // immutable; the faults are a stream: what is asked for ahead will be used in the same way
	heal   bool                 // immutable; the page was in Error: other mappings may be poisoned
	mark   mark                 // immutable; to be left out of the mapping, if the pages are filled as one extent
	failed func(emm.KernReturn) // immutable; told of errors; may be nil
	done   func()               // immutable; called once when all is answered and installed; may be nil

	left     int64               // guarded by Object.reqMu: pages not yet claimed by an answer
	claimed  [maxRun / 64]uint64 // guarded by Object.reqMu: bit i: page a+i was answered
	filling  int64               // guarded by Object.reqMu: answers being installed
	reported bool                // guarded by Object.reqMu: its age was logged
}

// request asks for page p, which the caller has just made Requested, and for its neighbours. It never waits.
func (o *Object) request(m *Mapping, p int64, f faulter, heal bool) {
	if p >= o.limit.Load() {
		m.stats.errors.Add(1)
		m.poison(p)
		o.end(p, page.Abandon)
		return
	}
	if o.reserve(1) == 0 {
		o.end(p, page.Abandon)
		o.vm.deferFault(m, p, f)
		return
	}
	a, b, stream := m.ahead(p, f)
	failpoint.Here("request.taken")
	r := requests.Get().(*request)
	*r = request{m: m, a: a, b: b, need: p, f: f, write: f.ev != page.FaultRead, stream: stream, heal: heal}
	o.ask(r)
}

// extend takes Absent neighbours of p in [lo, hi) as far as there are frames: forward first, then backward.
func (o *Object) extend(p, lo, hi int64) (a, b int64) {
	a, b = p, p+1
	hi = min(hi, o.limit.Load())
	got := o.reserve(max(0, hi-lo-1))
	take := func(q int64) bool {
		if got == 0 {
			return false
		}
		if _, _, eff := o.step(q, page.Prefetch); eff != page.Request {
			return false
		}
		got--
		return true
	}
	for b < hi && take(b) {
		b++
	}
	for a > lo && take(a-1) {
		a--
	}
	if end := max(p+1, o.limit.Load()); end < b { // it has shrunk meanwhile; who shrinks sets the limit first, and waits for what is Requested
		o.abandon(end, b)
		b = end
	}
	o.release(got)
	return a, b
}

// ask sends the request to the manager, or answers it with zeros if there is none yet. The pages are Requested and have frames.
func (o *Object) ask(r *request) {
	b := o.binding.Load() // after the pages became Requested: a manager that got them before is seen
	if b == nil {
		o.fill(r, r.a, r.b, nil, false)
		if r.done != nil {
			r.done()
		}
		requests.Put(r)
		return
	}
	r.left = r.b - r.a
	first, end, need, access := r.a, r.b, int64(-1), emm.ProtRead // r is another's as soon as it can be answered
	if r.need >= 0 {
		need = r.need << o.shift
	}
	if r.write {
		access |= emm.ProtWrite
	}
	o.reqMu.Lock()
	if len(o.requests) >= MaxRequests || !o.vm.mayAsk(r.m.task) {
		o.reqMu.Unlock()
		o.abandon(r.a, r.b)
		if r.need >= 0 {
			o.vm.deferFault(r.m, r.need, r.f)
		}
		if r.done != nil {
			r.done()
		}
		return
	}
	o.requests = append(o.requests, r)
	o.reqMu.Unlock()
	if o.control.destroyed.Load() { // perhaps too late for the end to answer it, and the manager will not
		o.answer(first, end, func(q *request, a, b int64) { o.fail(q, a, b, emm.MemoryFailure) })
		return
	}
	run := emm.Run{Off: first << o.shift, Size: (end - first) << o.shift}
	failpoint.Here("request.ask")
	if kr := b.manager.DataRequest(b.head(o), run, need, access); kr.Err() != nil {
		// It has dropped the message: nothing more will come for what it did not answer.
		o.vm.log.Warn("data request refused", "object", o.id, "off", run.Off, "size", run.Size, "result", kr)
		o.answer(first, end, func(q *request, a, b int64) { o.fail(q, a, b, emm.MemoryError) })
	}
}

// mayAsk counts one more request that is out for a task, if it may have one.
func (v *VM) mayAsk(t *Task) bool {
	if t == nil || t.requests.Add(1) <= v.taskFaults {
		return true
	}
	t.requests.Add(-1)
	return false
}

// asked ends mayAsk, and reports whether the task had as many as it may have: others may have been put aside.
func (v *VM) asked(t *Task) (full bool) { return t != nil && t.requests.Add(-1) == v.taskFaults-1 }

// answer finds the requests that the pages [a, b) belong to and calls fn for each run of pages not answered before: the caller of answer owns them from then
// on. What nobody asked for is counted.
func (o *Object) answer(a, b int64, fn func(r *request, a, b int64)) {
	for a < b {
		r, lo, hi := o.claim(a, b)
		if r == nil {
			o.vm.counters.unasked.Add(b - a)
			return
		}
		o.vm.counters.unasked.Add(lo - a)
		fn(r, lo, hi)
		o.filled(r)
		a = hi
	}
}

// answerAll fails everything that is outstanding.
func (o *Object) answerAll(reason emm.KernReturn) {
	o.reqMu.Lock()
	var runs [][2]int64
	for _, r := range o.requests {
		runs = append(runs, [2]int64{r.a, r.b})
	}
	o.reqMu.Unlock()
	for _, r := range runs {
		o.answer(r[0], r[1], func(q *request, a, b int64) { o.fail(q, a, b, reason) })
	}
}

// claim takes the first run of unanswered pages in [a, b).
func (o *Object) claim(a, b int64) (r *request, lo, hi int64) {
	o.reqMu.Lock()
	defer o.reqMu.Unlock()
	lo = b
	for _, q := range o.requests {
		for p := max(a, q.a); p < min(lo, q.b); p++ {
			if i := p - q.a; q.claimed[i/64]&(1<<(i%64)) == 0 {
				r, lo = q, p
				break
			}
		}
	}
	if r == nil {
		return nil, 0, 0
	}
	for hi = lo; hi < min(b, r.b); hi++ {
		i := hi - r.a
		if r.claimed[i/64]&(1<<(i%64)) != 0 {
			break
		}
		r.claimed[i/64] |= 1 << (i % 64)
	}
	r.left -= hi - lo
	r.filling++
	return r, lo, hi
}

// filled ends an answer; the last one ends the request.
func (o *Object) filled(r *request) {
	o.reqMu.Lock()
	r.filling--
	last := r.left == 0 && r.filling == 0
	full := len(o.requests) >= MaxRequests
	if last {
		full = o.vm.asked(r.m.task) || full
		i := slices.Index(o.requests, r)
		o.requests[i] = o.requests[len(o.requests)-1]
		o.requests[len(o.requests)-1] = nil
		o.requests = o.requests[:len(o.requests)-1]
	}
	o.reqMu.Unlock()
	if !last {
		return
	}
	if full {
		o.vm.kickDeferred()
	}
	if r.done != nil {
		r.done()
	}
	requests.Put(r)
}

// fail answers pages with an error. Only the thread that waits is told: what was asked for ahead of need is Absent again.
func (o *Object) fail(r *request, a, b int64, reason emm.KernReturn) {
	o.release(b - a)
	if r.failed != nil {
		r.failed(reason)
	}
	for p := a; p < b; p++ {
		if p != r.need {
			o.end(p, page.Abandon)
			continue
		}
		o.reqMu.Lock()
		o.reasons[p] = reason
		o.reqMu.Unlock()
		if r.m.gate.enter() {
			r.m.stats.errors.Add(1)
			r.m.poison(p)
			r.m.latency(r.f.start)
			o.vm.token.got(r.m.task, r.f.tid, o, p)
			r.m.gate.leave()
		}
		if reason == emm.MemoryFailure {
			o.end(p, page.FailForever)
		} else {
			o.end(p, page.Fail)
			o.vm.healLater(o, p)
		}
	}
}
