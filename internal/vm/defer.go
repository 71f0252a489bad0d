package vm

import (
	"time"

	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// deferredFault is a fault that found no frame, or too many requests outstanding. The page is nobody's meanwhile.
type deferredFault struct {
	m      *Mapping
	p      int64
	f      faulter
	wanted int64 // frames that are to be made free for it, whoever has them; 0: it is not for want of them that it waits, but of room under a maximum of its own, or of a request
}

// waiting is a thread that waits for a page.
type waiting struct {
	m   *Mapping
	p   int64
	tid uint32
}

// deferFault puts a fault aside for the page-out daemon. It never waits. A signal to a thread that waits (the Go runtime sends some all the time) makes it fault
// again: that is the same fault, and has waited since its first message.
func (v *VM) deferFault(m *Mapping, p int64, f faulter) {
	v.counters.deferred.Add(1)
	n := int64(m.obj.framesOf(1))
	if !m.obj.roomFor(n) || v.freeFrames() >= n+v.lastFrames() {
		n = 0 // others need not give theirs
	}
	k := waiting{m, p, f.tid}
	v.deferMu.Lock()
	if i, ok := v.deferAt[k]; ok {
		d := &v.deferred[i]
		if f.ev != page.FaultRead {
			d.f.ev = f.ev
		}
		if f.start.Before(d.f.start) {
			d.f.start = f.start
		}
	} else {
		if v.deferAt == nil {
			v.deferAt = map[waiting]int{}
		}
		v.deferAt[k] = len(v.deferred)
		v.deferred = append(v.deferred, deferredFault{m, p, f, n})
		v.wanted.Add(n)
	}
	v.starving.Store(true)
	v.deferMu.Unlock()
	v.token.pressed()
	if !f.retry {
		v.kickNow() // a retry is the daemon's own: it looks again when frames are freed, or a little later
	}
}

// kickDeferred tells the page-out daemon, if anything waits, that frames were freed.
func (v *VM) kickDeferred() {
	if v.starving.Load() {
		v.kickNow()
	}
}

func (v *VM) kickNow() {
	select {
	case v.kick <- struct{}{}:
	default:
	}
}

// retryDeferred serves the faults that were put aside, as far as there are frames now; the others put themselves aside again. The token's holder goes
// first, then who is spared. stuck: nothing can be reclaimed and nothing is on its way, so who has waited for long gets an error.
func (v *VM) retryDeferred(stuck bool) {
	v.deferMu.Lock()
	faults := v.deferred
	v.deferred = nil
	clear(v.deferAt)
	v.starving.Store(false)
	for _, d := range faults {
		v.wanted.Add(-d.wanted)
	}
	v.deferMu.Unlock()
	failed := map[waiting]bool{}     // tid 0
	turn := make([]int, len(faults)) // looked at once, for the token may pass on meanwhile
	for i, d := range faults {
		switch {
		case v.token.held(d.m.task, d.f.tid):
		case d.m.obj.spared.Load():
			turn[i] = 1
		default:
			turn[i] = 2
		}
	}
	for pass := range 3 {
		for i, d := range faults {
			if failed[waiting{d.m, d.p, 0}] {
				continue // its thread has got the error
			}
			if turn[i] != pass || !d.m.gate.enter() { // a mapping that is gone: its threads are too
				continue
			}
			if d.m.mustWait(d.p) { // for an answer, which tells the daemon
				d.f.retry = true
				v.deferFault(d.m, d.p, d.f)
			} else if (stuck || d.m.obj.room.full.Load() || d.m.obj.account.isFull()) && time.Since(d.f.start) > shortageAfter {
				if v.shortage(d) {
					failed[waiting{d.m, d.p, 0}] = true
				}
			} else {
				d.f.retry = true
				d.m.fault(d.p, d.f)
			}
			d.m.gate.leave()
		}
	}
}

// mustWait reports whether a fault on page p can only be put aside again: its manager is to be asked, and has as many requests as may be out. Trying would take a frame and give it
// back, which wakes the daemon: with a manager that never answers it would do nothing else.
func (m *Mapping) mustWait(p int64) bool {
	o := m.obj
	if o.word(p).State() != page.Absent || o.binding.Load() == nil || o.control.destroyed.Load() || p >= o.limit.Load() {
		return false
	}
	o.reqMu.Lock()
	full := len(o.requests) >= MaxRequests
	o.reqMu.Unlock()
	return full || m.task != nil && m.task.requests.Load() >= o.vm.taskFaults
}

// shortage answers a fault for which there is no frame to be had, as a data_error would: who touches the page later asks again, and so does the vm. It reports
// whether that is still so.
func (v *VM) shortage(d deferredFault) (failed bool) {
	o := d.m.obj
	if !o.gate.enter() {
		return false
	}
	defer o.gate.leave()
	if _, _, eff := o.step(d.p, page.Prefetch); eff != page.Request {
		d.m.fault(d.p, d.f) // somebody has brought it in, or is about to
		return false
	}
	if o.reserve(1) == 1 {
		o.release(1) // just now
		o.end(d.p, page.Abandon)
		d.m.fault(d.p, d.f)
		return false
	}
	if now, last := time.Now().UnixNano(), v.shortLogged.Load(); now-last > int64(shortagePause) && v.shortLogged.CompareAndSwap(last, now) {
		v.log.Warn("no frame can be reclaimed: faults are answered with errors", "object", o.id, "budget", v.frames.Budget())
	}
	o.reqMu.Lock()
	o.reasons[d.p] = emm.ResourceShortage
	o.reqMu.Unlock()
	d.m.stats.errors.Add(1)
	d.m.poison(d.p)
	v.undefer(d.m, d.p)
	o.end(d.p, page.Fail)
	v.healLater(o, d.p)
	return true
}

// undefer drops the faults that were answered by a poisoned page.
func (v *VM) undefer(m *Mapping, p int64) {
	v.deferMu.Lock()
	defer v.deferMu.Unlock()
	keep := v.deferred[:0]
	clear(v.deferAt)
	for _, d := range v.deferred {
		if d.m == m && d.p == p {
			v.wanted.Add(-d.wanted)
			continue
		}
		v.deferAt[waiting{d.m, d.p, d.f.tid}] = len(keep)
		keep = append(keep, d)
	}
	clear(v.deferred[len(keep):])
	v.deferred = keep
}
