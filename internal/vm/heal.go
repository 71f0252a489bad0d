package vm

import (
	"sync"
	"time"

	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

const (
	healFirst = 100 * time.Millisecond
	healLast  = 10 * time.Second
	healMax   = 1 << 16 // pages waiting; beyond, only the next touch asks again
)

// healQueue holds pages in Error that the vm asks for again by itself, with back-off, so that a store that recovers heals the memory.
type healQueue struct {
	some  chan struct{} // capacity 1: the queue is not empty any more
	mu    sync.Mutex
	pages map[healKey]*healing // guarded by mu
}

type healKey struct {
	o *Object
	p int64
}

type healing struct {
	at   time.Time
	wait time.Duration
}

// healLater has page p asked for again after its back-off, twice as long as the time before.
func (v *VM) healLater(o *Object, p int64) {
	q := &v.heals
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.pages == nil {
		q.pages = map[healKey]*healing{}
	}
	k := healKey{o, p}
	h := q.pages[k]
	if h == nil {
		if len(q.pages) >= healMax {
			return
		}
		h = &healing{wait: healFirst / 2}
		q.pages[k] = h
		select {
		case q.some <- struct{}{}:
		default:
		}
	}
	h.wait = min(2*h.wait, healLast)
	h.at = time.Now().Add(h.wait)
}

// serveHeals sleeps as long as no page is in Error.
func (v *VM) serveHeals() {
	for {
		select {
		case <-v.ctx.Done():
			return
		case <-v.heals.some:
		}
		for again := true; again; {
			select {
			case <-v.ctx.Done():
				return
			case now := <-time.After(healFirst / 4):
				var due []healKey
				due, again = v.heals.due(now)
				for _, k := range due {
					v.heal(k)
				}
			}
		}
	}
}

// due returns the pages whose time has come, and whether any wait at all.
func (q *healQueue) due(now time.Time) (due []healKey, more bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for k, h := range q.pages {
		if now.After(h.at) {
			due = append(due, k)
			h.at = now.Add(h.wait) // in case nothing comes of it
		}
	}
	return due, len(q.pages) > 0
}

func (q *healQueue) forget(k healKey) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.pages, k)
}

// heal asks again for one page, if it is still in Error.
func (v *VM) heal(k healKey) {
	o := k.o
	if !o.gate.enter() {
		v.heals.forget(k)
		return
	}
	defer o.gate.leave()
	if o.word(k.p).State() != page.Error {
		v.heals.forget(k)
		o.reqMu.Lock()
		delete(o.reasons, k.p)
		o.reqMu.Unlock()
		return
	}
	if v.freeFrames() < int64(o.framesOf(1)) {
		return // later: nobody waits
	}
	if f := int64(o.framesOf(1)); !o.roomFor(f) {
		o.lackRoom(f)
		return
	}
	for _, m := range *o.maps.Load() {
		if m.task == nil || !m.has(k.p) || m.addr(k.p, k.p+1) == 0 || !m.gate.enter() {
			continue
		}
		if o.stepFrom(k.p, page.Error, page.FaultRead) == page.Request { // otherwise somebody else has asked
			o.request(m, k.p, faulter{ev: page.FaultRead, start: time.Now(), retry: true}, true)
			v.kickNow() // if it was put aside for want of a frame: the daemon may be asleep, and nobody faults here who would wake it
		}
		m.gate.leave()
		return
	}
	v.heals.forget(k) // nobody maps it
}

// FaultReason tells why a touch of the byte off of the mapping (from its beginning) ended in SIGBUS or EFAULT: nil if the page is in order now.
func (m *Mapping) FaultReason(off int64) error {
	o := m.obj
	if o.control.destroyed.Load() {
		return emm.MemoryFailure
	}
	if off < 0 || off >= m.size {
		return emm.InvalidAddress
	}
	if !o.gate.enter() {
		return emm.InvalidObject
	}
	defer o.gate.leave()
	p := (m.off + off) >> o.shift
	o.reqMu.Lock()
	reason, ok := o.reasons[p]
	o.reqMu.Unlock()
	switch w := o.word(p); {
	case p >= o.limit.Load():
		return emm.MemoryError
	case w.State() == page.Error && w&page.Failure != 0:
		return emm.MemoryFailure
	case ok:
		return reason
	case w.State() == page.Error:
		return emm.MemoryError
	}
	return nil
}
