package vm

import (
	"cmp"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"machpager/internal/policy"
	"machpager/internal/vm/page"
)

// Dirty pages are cleaned ahead: those that will be victims soon are returned to their managers, and stay, write-protected. When their turn comes they go at once, however
// long their manager took. What is written again before that was returned for nothing, so only what is next is cleaned, only while pages are being evicted at all, and only for managers that take
// longer than the call: one that has stored what it is given when the call returns (memory, compressed or not) is as quick at the end, and cleaning ahead made random writes to such paging space
// a third slower.
//
// The cleaner is one goroutine beside the page-out daemon, which must not wait for it. Like the daemon it waits for nothing: where no
// buffer is to be had it leaves pages dirty. A victim that is just being cleaned is marked in its return: it goes when the manager has it (goWhenStored).
//
// If the pager dies the pages are Cleaning or Clean, as after any other return.

const (
	// aheadShare of the budget is cleaned ahead, at most aheadMax bytes: about what managers may be lent at one time.
	aheadShare = 16
	aheadMax   = 8 << 20
	// aheadLooks is how often it is looked at within that.
	aheadLooks = 4
)

// cleaner is the state of cleaning ahead.
type cleaner struct {
	kick    chan struct{} // capacity 1
	evicted atomic.Int64  // frames that the page-out daemon has let go of since the last look
	dirty   atomic.Bool   // a victim, or what the last look met, had to be returned to a manager that takes its time
	next    []policy.Run  // the cleaner's alone
}

// ahead is how many frames are kept clean ahead of page-out. Small budgets, which have no reserve, have none: what one thread writes would be protected again and again.
func (v *VM) ahead() int64 {
	if low, _ := v.water(); low == 0 {
		return 0
	}
	return min(v.frames.Budget()/aheadShare, aheadMax) / frameSize
}

// evictedSome tells the cleaner that page-out has gone on. While there is nothing dirty to be met it is not woken.
func (v *VM) evictedSome(frames int64) {
	if v.cleaner.dirty.Load() && v.cleaner.evicted.Add(frames) >= v.ahead()/aheadLooks {
		select {
		case v.cleaner.kick <- struct{}{}:
		default:
		}
	}
}

// cleanAhead is the cleaner.
func (v *VM) cleanAhead() {
	c := &v.cleaner
	for {
		select {
		case <-v.ctx.Done():
			return
		case <-c.kick:
		}
		c.evicted.Store(0)
		c.dirty.Store(false)
		n := v.ahead()
		if n == 0 {
			continue
		}
		c.next = v.policy.Next(n, c.next[:0])
		slices.SortFunc(c.next, func(x, y policy.Run) int {
			return cmp.Or(cmp.Compare(x.Object, y.Object), cmp.Compare(x.First, y.First))
		})
		now := time.Now()
		for i := 0; i < len(c.next); {
			r := c.next[i]
			for i++; i < len(c.next) && c.next[i].Object == r.Object && c.next[i].First == r.First+r.N; i++ {
				r.N += c.next[i].N
			}
			v.mu.Lock()
			o := v.objects[r.Object]
			v.mu.Unlock()
			if o == nil || v.ctx.Err() != nil || !o.gate.enter() {
				continue
			}
			if o.failing().takesTime() && !o.resting(now) && !(v.contended.Load() && o.spared.Load()) && o.spares(1) {
				o.cleanRun(r.First*frameSize>>o.shift, (r.First+r.N)*frameSize>>o.shift)
			}
			o.gate.leave()
		}
	}
}

// cleanRun returns what is dirty of the pages [a, b) and keeps it.
func (o *Object) cleanRun(a, b int64) {
	limit := min(int64(o.vm.bufs.size)>>o.shift, o.failing().most())
	op := &lockOp{ahead: true}
	defer o.unlend(op)
	for p := a; p < b; {
		if !o.cleanable(p) {
			p++
			continue
		}
		most := min(limit, o.lendFor(op, p, b))
		end := p
		for end < b && end-p < most && o.cleanable(end) && o.begin(end, page.BeginClean) {
			end++
		}
		if end == p {
			if most == 0 {
				return // all buffers are lent
			}
			p++
			continue
		}
		o.vm.counters.cleanedAhead.Add(end - p)
		o.vm.cleaner.dirty.Store(true)
		if err := o.pushRun(o.vm.ctx, p, end, false, op); err != nil {
			if !errors.Is(err, errNoBuffer) {
				o.vm.log.Warn("clean ahead of page-out", "object", o.id, "err", err)
			}
			return
		}
		p = end
	}
}

// cleanable reports whether page p is dirty and may be let go of.
func (o *Object) cleanable(p int64) bool {
	w := o.word(p)
	return w.State() == page.Dirty && !w.Transitional() && w.Wired() == 0 && !o.vm.token.holds(o, p)
}

// goWhenStored makes a victim that is just being cleaned go as soon as its manager has it. It reports whether the page is on its way out then. The policy has forgotten it.
func (o *Object) goWhenStored(p int64) bool {
	o.reqMu.Lock()
	defer o.reqMu.Unlock()
	for _, d := range o.returns {
		if d.op.ahead && d.a <= p && p < d.b {
			if o.stalled.Load() || time.Since(d.start) > stalledAfter {
				return false // nobody believes any more that it will be completed
			}
			if d.victims == nil {
				d.victims = make([]bool, d.b-d.a)
				d.n, d.counted = 0, true
			}
			if !d.counted { // as above
				return false
			}
			f := int64(o.framesOf(1))
			d.victims[p-d.a] = true
			d.n += f
			o.vm.inflight.Add(f)
			o.room.leaving.Add(f)
			return true
		}
	}
	return false
}

// runs calls fn for the pages of a return that is out no more, in runs of which the policy has forgotten all or none.
func (d *dataReturn) runs(fn func(a, b int64, victims bool)) {
	if d.victims == nil {
		fn(d.a, d.b, d.op.victims)
		return
	}
	for p := d.a; p < d.b; {
		end := p + 1
		for end < d.b && d.victims[end-d.a] == d.victims[p-d.a] {
			end++
		}
		fn(p, end, d.victims[p-d.a])
		p = end
	}
}
