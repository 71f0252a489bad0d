package vm

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// residency is how much of an object may and must be resident, in frames. An object that is at its maximum makes room among its own pages: the page-out daemon goes
// around its table like a clock's hand and lets go of what has not been used since it last came by. Of an object that is at its minimum or below, the
// daemon takes no page for others.
type residency struct {
	min, max int64        // immutable; 0: none
	wired    atomic.Int64 // frames
	leaving  atomic.Int64 // frames of victims that the manager has not stored yet
	lack     atomic.Int64 // frames refused to who waits, since the daemon looked
	full     atomic.Bool  // the daemon found nothing to let go of, and nothing is on its way in or out
	hand     int64        // the daemon's alone; page

	mu   sync.Mutex // a leaf
	cold [][2]int64 // guarded by mu; ranges of pages that were advised to go first, at most maxCold
}

// maxCold bounds the ranges that are remembered. More are forgotten, but for their marks.
const maxCold = 64

// minResidentMax is the least maximum, in pages of the object: what one instruction can need at once, and as many more.
const minResidentMax = 8

// roomShare of an object's maximum is kept free by the daemon: more than of the budget, for it is usually small.
const roomShare = 8

// water is the room that the daemon keeps under the maximum: it begins below low and goes on to high. An object of few pages has none.
func (o *Object) water() (low, high int64) { return waterUnder(o.room.max, int64(o.framesOf(1))) }

// waterUnder is the room that is kept under a maximum, for pages of so many frames.
func waterUnder(limit, page int64) (low, high int64) {
	high = min(limit/roomShare, reserveMax/frameSize)
	if high < 4*page {
		return 0, 0
	}
	return high / 2, high
}

// recent marks a page of an object with a maximum that was waited for, or seen to be used, since the hand passed it. It is beside package page's bits, like given.
const recent page.Word = 1 << 9

// set checks and keeps the limits, in bytes: a minimum is rounded up to whole pages and is no more than the object, a maximum is rounded down.
func (r *residency) set(low, high, size, pageSize int64) error {
	switch {
	case low < 0 || high < 0:
		return fmt.Errorf("resident minimum %d, maximum %d: want bytes, or 0 for none: %w", low, high, emm.InvalidArgument)
	case high != 0 && high < minResidentMax*pageSize:
		return fmt.Errorf("resident maximum %d: want at least %d pages of %d bytes: %w", high, minResidentMax, pageSize, emm.InvalidArgument)
	}
	low, high = (min(low, size)+pageSize-1)&^(pageSize-1), high&^(pageSize-1)
	if high != 0 && low > high {
		return fmt.Errorf("resident minimum %d: more than the maximum %d: %w", low, high, emm.InvalidArgument)
	}
	r.min, r.max = low/frameSize, high/frameSize
	return nil
}

// guarantees are the minima of all objects.
type guarantees struct {
	mu       sync.Mutex   // held while a minimum is added or the budget is changed; a leaf but for the lock of the frames' pool
	frames   atomic.Int64 // the sum of the minima
	promised atomic.Int64 // the sum of what is more, an object's minimum or its wired frames
}

func (g *guarantees) add(f int64) {
	g.frames.Add(f)
	g.promised.Add(f)
}

// unpromised is what of so large a budget can be neither wired nor guaranteed: the reserve, and what one instruction may need, twice.
func unpromised(budget, pageFrames int64) int64 {
	_, high := waterOf(budget)
	return high + max(wireSlack, wireSlack*pageFrames)
}

// guarantee adds an object's minimum to the sum, if the budget allows it.
func (v *VM) guarantee(f int64) error {
	if f == 0 {
		return nil
	}
	v.guaranteed.mu.Lock()
	defer v.guaranteed.mu.Unlock()
	budget := v.frames.Budget() / frameSize
	if free := budget - unpromised(budget, 1) - v.guaranteed.promised.Load(); f > free {
		return fmt.Errorf("resident minimum of %d bytes: of the budget of %d bytes only %d are neither wired nor guaranteed already: %w", f*frameSize, budget*frameSize,
			max(0, free)*frameSize, emm.ResourceShortage)
	}
	v.guaranteed.add(f)
	return nil
}

// setFrames makes the budget so many bytes if the guarantees allow it and no more is in use.
func (v *VM) setFrames(bytes int64) (allowed bool, err error) {
	v.guaranteed.mu.Lock()
	defer v.guaranteed.mu.Unlock()
	if f := v.guaranteed.frames.Load(); f > 0 && f > bytes/frameSize-unpromised(bytes/frameSize, 1) {
		return false, fmt.Errorf("the objects' minima together are %d bytes: %w", f*frameSize, emm.ResourceShortage)
	}
	return true, v.frames.SetBudget(bytes)
}

// allowance is how many bytes the object may have resident.
func (o *Object) allowance() int64 {
	n := o.vm.frames.Budget()
	if most := o.most(); most != 0 {
		n = min(n, most*frameSize)
	}
	return n
}

// most is how many frames the object may have by its own maximum and its account's; 0: as many as there are.
func (o *Object) most() int64 {
	n := o.room.max
	if a := o.account; a != nil && (n == 0 || a.max < n) {
		n = a.max
	}
	return n
}

// roomFor reports whether f more frames fit under the maxima of object and account.
func (o *Object) roomFor(f int64) bool {
	a := o.account
	return (o.room.max == 0 || o.resident.Load()+f <= o.room.max) && (a == nil || a.used.Load()+f <= a.max)
}

// lackRoom has the page-out daemon make room for f frames under the maxima, for who asks again later.
func (o *Object) lackRoom(f int64) {
	if a := o.account; a != nil && a.used.Load()+f > a.max {
		a.lack.Add(f)
		a.crowd(o.vm)
	}
	if o.room.max != 0 && o.resident.Load()+f > o.room.max {
		o.room.lack.Add(f)
		o.vm.crowded.Store(true)
	}
	o.vm.kickNow()
}

// admit takes room under the account's and the object's maximum for up to n pages, and returns for how many.
func (o *Object) admit(n int64) int64 {
	f := int64(o.framesOf(1))
	n = o.account.admit(o.vm, n, f)
	got := o.admitOwn(n)
	o.account.add((got - n) * f)
	return got
}

// admitOwn takes room under the object's maximum.
func (o *Object) admitOwn(n int64) int64 {
	if n == 0 {
		return 0
	}
	r, f := &o.room, int64(o.framesOf(1))
	if r.max == 0 {
		o.resident.Add(n * f)
		return n
	}
	for {
		used := o.resident.Load()
		got := min(n, (r.max-used)/f)
		if got <= 0 {
			if n == 1 {
				r.lack.Add(f)
				o.vm.crowded.Store(true) // who waits for it kicks
			}
			return 0
		}
		if o.resident.CompareAndSwap(used, used+got*f) {
			if low, _ := o.water(); r.max-used-got*f < low {
				o.vm.crowded.Store(true)
				o.vm.kickNow()
			}
			return got
		}
	}
}

// used marks a page for the hand.
func (o *Object) used(p int64) {
	if o.most() != 0 {
		o.words[p].Or(uint64(recent))
	}
}

// cold advises that the pages [a, b) are not needed soon: they go first, also when the object makes room among its own.
func (o *Object) cold(a, b int64) {
	o.vm.policy.Cold(o.frameRun(a, b))
	r := &o.room
	if o.most() == 0 || a >= b {
		return
	}
	walk := touched{o: o}
	for p := walk.next(a, b); p < b; p = walk.next(p+1, b) {
		if o.word(p)&recent != 0 {
			o.words[p].And(^uint64(recent))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.cold); n > 0 && r.cold[n-1][1] == a { // dropped behind a stream
		r.cold[n-1][1] = b
	} else if n < maxCold {
		r.cold = append(r.cold, [2]int64{a, b})
	}
}

// nextCold takes the range that was advised first.
func (r *residency) nextCold() (a, b int64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.cold) == 0 {
		return 0, 0, false
	}
	a, b = r.cold[0][0], r.cold[0][1]
	r.cold = slices.Delete(r.cold, 0, 1)
	return a, b, true
}

// stillCold puts back what is left of a range.
func (r *residency) stillCold(a, b int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a < b {
		r.cold = slices.Insert(r.cold, 0, [2]int64{a, b})
	}
}

// spares reports whether n more pages can go without the object falling below its minimum.
func (o *Object) spares(n int64) bool {
	return o.room.min == 0 || o.resident.Load()-o.room.leaving.Load()-int64(o.framesOf(n)) >= o.room.min
}

// makeRoom lets objects that are near their maxima let go of pages. For the page-out daemon.
func (v *VM) makeRoom() {
	if !v.crowded.Swap(false) {
		return
	}
	all := v.allObjects()
	for _, o := range all {
		if o.room.max != 0 && o.gate.enter() {
			o.makeRoom()
			o.gate.leave()
		}
		if a := o.account; a != nil && a.crowded.Swap(false) {
			a.makeRoom(all)
		}
	}
}

func (o *Object) makeRoom() {
	r := &o.room
	low, high := o.water()
	lack := min(r.lack.Swap(0), r.max/2)
	free := r.max - o.resident.Load() + r.leaving.Load()
	if free >= max(low, lack) {
		r.full.Store(false)
		return
	}
	begun := o.sweep(max(high, lack)-free, o.resting(time.Now()))
	o.reqMu.Lock()
	coming := len(o.requests)
	o.reqMu.Unlock()
	r.full.Store(begun == 0 && coming == 0 && r.leaving.Load() == 0)
}

// sweep moves the hand on until want frames are free or on their way, at most twice around: the first time it may only take marks away. It returns the frames begun.
// clean: only of what need not be returned to a manager.
func (o *Object) sweep(want int64, clean bool) (begun int64) {
	op := &lockOp{own: true}
	defer o.unlend(op)
	limit := min(int64(o.vm.bufs.size)>>o.shift, o.failing().most())
	over := func(from, to int64) {
		o.file.Present(from<<o.shift, (to-from)<<o.shift, func(off, n int64) bool {
			p, b := off>>o.shift, (off+n+o.pageSize-1)>>o.shift
			for p < b && begun < want {
				back := o.mustReturn(p)
				most, only := limit, clean
				if back {
					n := o.lendFor(op, p, b)
					most, only = min(limit, max(1, n)), clean || n == 0
				}
				end := p
				for end < b && end-p < most && begun+int64(o.framesOf(end-p)) < want && o.mustReturn(end) == back && o.takeOld(end, only) {
					end++
				}
				if end == p {
					p++
				} else {
					err := o.pushRun(o.vm.ctx, p, end, true, op)
					if err != nil {
						if !errors.Is(err, errNoBuffer) {
							o.vm.log.Warn("page-out", "object", o.id, "err", err)
						}
						return false
					}
					begun += int64(o.framesOf(end - p))
					p = end
				}
				o.room.hand = p
			}
			return begun < want
		})
	}
	n, hand := o.npages(), o.room.hand
	for begun < want {
		a, b, ok := o.room.nextCold()
		if !ok {
			break
		}
		o.room.hand = a
		over(a, b)
		if begun >= want {
			o.room.stillCold(o.room.hand, b)
		}
	}
	o.room.hand = hand
	start := o.room.hand % n
	for _, part := range [...][2]int64{{start, n}, {0, n}, {0, n}} {
		if begun < want {
			over(part[0], part[1])
		}
	}
	return begun
}

// takeOld makes page p the caller's if it can be let go of and was not used since the hand passed.
func (o *Object) takeOld(p int64, clean bool) bool {
	w := o.word(p)
	if w.Transitional() || w.Wired() > 0 || !w.Resident() || o.vm.token.holds(o, p) {
		return false
	}
	if w&recent != 0 {
		o.words[p].And(^uint64(recent))
		return false
	}
	if clean {
		return o.takeVictim(p, true)
	}
	return o.take(p, emm.ReturnAll, true)
}

// countWired counts f more wired frames, a page, if the budget, what is promised of it and the maxima of object and account allow it.
func (o *Object) countWired(f int64) bool {
	v, r := o.vm, &o.room
	budget := v.frames.Budget() / frameSize
	wired, promised, more := o.chargeWired(f)
	fits := promised <= budget-unpromised(budget, f) || more == 0
	if fits && (r.max == 0 || wired <= r.max-minResidentMax/2*f) && o.account.mayWire(f) {
		return true
	}
	o.uncountWired(f)
	return false
}

// chargeWired counts f more wired frames: how many the object has then, how many are promised by all, and how many of these are new.
func (o *Object) chargeWired(f int64) (wired, promised, more int64) {
	wired = o.room.wired.Add(f)
	more = o.room.promised(wired) - o.room.promised(wired-f)
	o.vm.wired.Add(f)
	o.account.addWired(f)
	return wired, o.vm.guaranteed.promised.Add(more), more
}

func (o *Object) uncountWired(f int64) {
	wired := o.room.wired.Add(-f)
	o.vm.wired.Add(-f)
	o.account.addWired(-f)
	o.vm.guaranteed.promised.Add(o.room.promised(wired) - o.room.promised(wired+f))
}

// promised is what an object with so many wired frames keeps from all others.
func (r *residency) promised(wired int64) int64 { return max(r.min, wired) }
