package vm

import (
	"context"
	"errors"
	"time"

	"machpager/internal/policy"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

const (
	// reserveShare of the budget, at most reserveMax bytes, is kept free by background page-out, so that a fault finds a frame waiting. Very small
	// budgets have no reserve: there a fault waits until one is made free.
	reserveShare = 32
	reserveMax   = 32 << 20
	reserveMin   = 16 // frames; a smaller reserve is none

	// victimBatch is how many frames are chosen at once: enough for long runs, few enough that what is used meanwhile can still show it.
	victimBatch = 1024

	// refusedPause is how long the page-out daemon rests when the kernel refuses frames that are in no file: that passes by itself.
	refusedPause = 500 * time.Microsecond

	// shortageAfter is how long a fault waits for frames when nothing can be reclaimed, before its thread gets KERN_RESOURCE_SHORTAGE.
	shortageAfter = 5 * time.Second

	// shortagePause is how long nothing more is logged about such faults.
	shortagePause = 10 * time.Second
)

// water is the reserve of free frames: page-out starts below low and goes on to high.
func (v *VM) water() (low, high int64) { return waterOf(v.frames.Budget() / frameSize) }

// waterOf is the reserve of so many frames.
func waterOf(limit int64) (low, high int64) {
	high = min(limit/reserveShare, reserveMax/frameSize)
	if high < reserveMin {
		return 0, 0
	}
	return high / 2, high
}

func (v *VM) freeFrames() int64 { return v.frames.Budget()/frameSize - v.frames.Reserved() }

// pageout is the page-out daemon: it keeps the reserve of frames, and makes frames free for faults that wait for them. It does not wait for managers:
// what they have not stored yet is in flight, and its completion kicks.
func (v *VM) pageout() {
	filling := false // between low and high water
	var look time.Time
	for {
		wait := time.Hour
		if v.starving.Load() || v.wanted.Load() > 0 {
			wait = time.Millisecond
		}
		select {
		case <-v.ctx.Done():
			return
		case <-v.kick:
		case <-time.After(wait):
		}
		v.makeRoom()
		v.deal()
		stuck := false
		for v.ctx.Err() == nil {
			low, high := v.water()
			free := v.freeFrames()
			filling = filling && free < high || free < low
			want := v.wanted.Load() - free
			if filling {
				want += high
			}
			if want -= v.inflight.Load(); want <= 0 {
				break
			}
			begun, now := int64(0), time.Now()
			if now.After(look) {
				var rested bool
				begun, rested = v.evict(want, now)
				v.evictedSome(begun)
				// Where managers rest, all that is resident may be looked at for a clean page. In vain that is not to take more than a twentieth of the time.
				if rested && begun == 0 {
					look = time.Now().Add(max(time.Millisecond, 20*time.Since(now)))
				}
			}
			if begun == 0 {
				stuck = v.inflight.Load() == 0
				break
			}
		}
		if v.refused.Swap(false) && v.scrub() == 0 {
			time.Sleep(refusedPause) // it passes
		}
		if v.starving.Load() {
			if stuck && v.freeFrames() < v.wanted.Load() {
				stuck = v.scrub() == 0
			}
			v.retryDeferred(stuck)
		}
	}
}

// lackFrames tells the page-out daemon when the reserve runs low. Called for every fill: two loads.
func (v *VM) lackFrames() {
	if low, _ := v.water(); v.freeFrames() < low {
		v.kickNow()
	}
}

// evict chooses victims for at least want frames, and lets go of them. It returns how many frames are free or on their way, and whether an object's manager rests: of those only
// what need not be returned goes, and all that is resident is looked at for enough of it. Objects that are spared lose pages only if the others have none to give.
func (v *VM) evict(want int64, now time.Time) (begun int64, rested bool) {
	if v.contended.Load() {
		if begun, rested = v.evictFrom(want, now, true); begun > 0 {
			return begun, rested
		}
	}
	return v.evictFrom(want, now, false)
}

func (v *VM) evictFrom(want int64, now time.Time, spare bool) (begun int64, rested bool) {
	seen, all := int64(0), v.frames.Reserved()
	for batch := min(want, victimBatch); begun == 0 || rested && begun < want; batch = victimBatch {
		v.victims = v.policy.Victims(batch, v.victims[:0])
		for _, r := range v.victims {
			seen += r.N
			v.mu.Lock()
			o := v.objects[r.Object]
			v.mu.Unlock()
			if o == nil || !o.gate.enter() {
				continue // ended: its frames are free or about to be
			}
			if spare && o.spared.Load() {
				o.keep(r.First*frameSize>>o.shift, (r.First+r.N)*frameSize>>o.shift)
				o.gate.leave()
				continue
			}
			clean := o.resting(now)
			rested = rested || clean
			begun += o.evict(r.First*frameSize>>o.shift, (r.First+r.N)*frameSize>>o.shift, clean)
			o.gate.leave()
		}
		// What objects keep as their minimum may be all that was named: the others come behind it. So may be what is spared.
		if seen > v.guaranteed.frames.Load() && !rested && !spare || seen > all || len(v.victims) == 0 {
			break
		}
	}
	return begun, rested
}

// evict lets go of the victims [a, b): the policy has forgotten them. What cannot go now (wired, owned by somebody, protected by the token, part of the object's
// minimum, no buffer to return it in) is given back to the policy. It returns the frames that are free or on their way.
func (o *Object) evict(a, b int64, clean bool) int64 {
	begun := int64(0)
	limit := min(int64(o.vm.bufs.size)>>o.shift, o.failing().most())
	op := &lockOp{victims: true}
	defer o.unlend(op)
	for p := a; p < b; {
		back := o.mustReturn(p)
		most, only := limit, clean
		if back {
			n := o.lendFor(op, p, b)
			most, only = min(limit, max(1, n)), clean || n == 0
		}
		end := p
		for end < b && end-p < most && o.mustReturn(end) == back && o.spares(end-p+1) && !o.vm.token.holds(o, end) && o.takeVictim(end, only) {
			end++
		}
		if end == p {
			if o.spares(1) && !o.vm.token.holds(o, p) && o.goWhenStored(p) {
				begun += int64(o.framesOf(1))
			} else {
				o.keep(p, p+1)
			}
			p++
			continue
		}
		if err := o.pushRun(o.vm.ctx, p, end, true, op); err == nil {
			begun += int64(o.framesOf(end - p))
		} else if !errors.Is(err, errNoBuffer) {
			o.vm.log.Warn("page-out", "object", o.id, "err", err)
		}
		p = end
	}
	return begun
}

// lendFor says how many of the pages [p, b), the first of which must be returned, op has a buffer for; 0: none. One is taken before any page is, and before anything is
// protected: while all are lent, dirty pages are left in peace.
func (o *Object) lendFor(op *lockOp, p, b int64) int64 {
	if op.buf == nil {
		end := p + 1
		for end < b && end-p < int64(o.vm.bufs.size)>>o.shift && o.mustReturn(end) {
			end++
		}
		var err error
		if op.buf, err = o.vm.bufs.tryGet(int((end-p)<<o.shift), &o.lent); err != nil && o.pageSize <= shortReturn {
			op.buf, _ = o.vm.bufs.tryGet(shortReturn, &o.lent)
		}
	}
	return int64(len(op.buf)) >> o.shift
}

func (o *Object) takeVictim(p int64, clean bool) bool {
	w := o.word(p)
	if clean && (w.State() != page.Clean || w&page.Precious != 0) {
		return false
	}
	return w.Wired() == 0 && o.take(p, emm.ReturnAll, true)
}

// keep tells the policy that victims are still there. A page that has gone meanwhile is not told: then a Fill tells of its next life, and if it goes in between, the policy
// names it once more and is not believed.
func (o *Object) keep(a, b int64) {
	for p := a; p < b; p++ {
		switch o.word(p).State() {
		case page.Requested, page.Clean, page.Dirty, page.Cleaning: // Requested: perhaps filled, and the word is about to say so
			o.vm.policy.Keep(o.frameRun(p, p+1), int64(o.framesOf(1)))
		}
	}
}

// frameRun is the pages [a, b) as the policy counts.
func (o *Object) frameRun(a, b int64) policy.Run {
	return policy.Run{Object: o.id, First: a << o.shift / frameSize, N: (b - a) << o.shift / frameSize}
}

// reclaimFor evicts for somebody who may wait: Populate. It returns the frames begun.
func (v *VM) reclaimFor(ctx context.Context, n int64) {
	v.wanted.Add(n)
	defer v.wanted.Add(-n)
	v.kickNow()
	select {
	case <-ctx.Done():
	case <-time.After(200 * time.Microsecond):
	}
}

// scrub punches out what lies in the files under Absent pages or behind their ends, and in files of objects that have ended: put there by a task's own
// hand, or left by a punch. It returns the frames freed.
func (v *VM) scrub() int64 {
	freed := v.frames.Reap() / frameSize
	v.counters.scrubbed.Add(freed)
	for _, o := range v.allObjects() {
		if o.gate.enter() {
			freed += o.scrub()
			o.gate.leave()
		}
	}
	return freed
}

func (o *Object) scrub() int64 {
	freed := int64(0)
	o.file.Present(0, o.size, func(off, n int64) bool {
		a, b := off>>o.shift, (off+n+o.pageSize-1)>>o.shift
		for p := a; p < b; {
			end := p
			for end < b && o.begin(end, page.Claim) {
				end++
			}
			if end == p {
				p++
				continue
			}
			n, err := o.punchAbsent(p, end)
			if err != nil {
				o.vm.log.Error("punch what nobody accounts for", "object", o.id, "off", p<<o.shift, "size", (end-p)<<o.shift, "err", err)
			}
			freed += n
			o.finishRun(p, end, page.Punched)
			p = end
		}
		return true
	})
	if n, err := o.file.Trim(); err == nil {
		freed += n / frameSize
	}
	o.vm.counters.scrubbed.Add(freed)
	return freed
}
