package vm

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"machpager/internal/failpoint"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// The order of page-out, for each run of pages, none of which may be changed: the owner takes the words (Cleaning or Evicting), protects in every
// mapping, reads the contents, returns them to the manager, hears ReturnCompleted(Success), punches, verified, makes the words Absent, wakes.
// A pager that dies at any of these points leaves Cleaning (the contents are in the file) or Evicting (they are stored): see page.Adopt.

// lockOp is a lock request under way: it ends when every return it began was completed.
type lockOp struct {
	victims bool   // immutable; of the page-out daemon: nobody waits, the policy has forgotten the pages
	ending  bool   // immutable; the object ends
	own     bool   // immutable; of the page-out daemon, for room under the object's maximum: nobody waits
	ahead   bool   // immutable; of the cleaner: nobody waits, the pages stay
	buf     []byte // the beginner's alone: what the next return goes into; nil: none was taken yet
	wg      sync.WaitGroup
	mu      sync.Mutex
	err     emm.KernReturn // guarded by mu: the first failure
}

// daemon reports whether it is the page-out daemon's or the cleaner's, which wait for nothing.
func (op *lockOp) daemon() bool { return op.victims || op.own || op.ahead }

func (op *lockOp) done(kr emm.KernReturn) {
	op.mu.Lock()
	if op.err == emm.Success {
		op.err = kr
	}
	op.mu.Unlock()
	op.wg.Done()
}

// dataReturn is a data_return or data_initialize that is out: pages [a, b) are Cleaning.
type dataReturn struct {
	a, b     int64
	buf      []byte
	flush    bool
	discard  bool // of zeros, so that the manager forgets: see discard.go
	op       *lockOp
	start    time.Time
	reported bool  // guarded by Object.reqMu
	counted  bool  // guarded by Object.reqMu: its frames are among those that are on their way
	n        int64 // guarded by Object.reqMu: these frames
	// guarded by Object.reqMu while it is out, then of who ends it: the pages that have become victims while they were cleaned ahead; nil: none
	victims []bool
	over    atomic.Bool // completed
}

// PageOut returns what is dirty or precious of the bytes [off, off+n) to the manager, waits until it has it, and lets go of the pages: the next touch is a
// data request (lock_request with return all and flush). Pages that are wired stay. An error means that some pages could not be stored: they are
// still resident and dirty. When ctx ends, what was begun goes on.
func (o *Object) PageOut(ctx context.Context, off, n int64) error {
	if !o.gate.enter() {
		return fmt.Errorf("page out: %w", emm.InvalidObject)
	}
	defer o.gate.leave()
	a, b, err := o.pages(off, n)
	if err != nil {
		return fmt.Errorf("page out: %w", err)
	}
	return o.lockRange(ctx, a, b, emm.ReturnAll, true)
}

// lockRange cleans and flushes pages [a, b). The caller is inside the object's gate.
func (o *Object) lockRange(ctx context.Context, a, b int64, ret emm.Return, flush bool) error {
	ctx, cancel := o.gate.bound(ctx, emm.InvalidObject)
	defer cancel()
	if err := o.vm.live(ctx); err != nil {
		return fmt.Errorf("page out: %w", err)
	}
	return o.lockPages(ctx, a, b, ret, flush, &lockOp{})
}

// lockPages is lockRange for who knows that all mappings are known.
func (o *Object) lockPages(ctx context.Context, a, b int64, ret emm.Return, flush bool, op *lockOp) error {
	limit := int64(o.vm.bufs.size) >> o.shift
	walk := touched{o: o}
	returns := func(p int64) bool { return ret != emm.ReturnNone && (o.mustReturn(p) || ret == emm.ReturnAnything) }
	err := func() error {
		for p := walk.next(a, b); p < b; p = walk.next(p, b) {
			if p&511 == 0 && ctx.Err() != nil {
				return fmt.Errorf("page out: %w", context.Cause(ctx))
			}
			back := returns(p)
			if back && op.buf == nil {
				var err error
				if op.ending {
					op.buf, err = o.vm.bufs.getAnyway(ctx, o.vm.endPatience/4, &o.lent)
				} else {
					op.buf, err = o.vm.bufs.get(ctx, o.vm.bufs.size, &o.lent) // before anybody's page is taken
				}
				if err != nil {
					return fmt.Errorf("page out: wait for a buffer: %w", err)
				}
			}
			end := p
			for end < b && end-p < limit && returns(end) == back && o.take(end, ret, flush) {
				end++
			}
			if end > p {
				if err := o.pushRun(ctx, p, end, flush, op); err != nil {
					return err
				}
				p = end
				continue
			}
			if w := o.word(p); !w.Transitional() || w.State() == page.Requested && !flush {
				p++ // not resident, or nothing to be done
				continue
			}
			o.unlend(op)
			if err := o.settled(ctx, p); err != nil {
				return err
			}
		}
		return nil
	}()
	o.unlend(op)
	if e := waitFor(ctx, &op.wg); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	op.mu.Lock()
	defer op.mu.Unlock()
	if op.err != emm.Success {
		return fmt.Errorf("page out: the manager did not store all pages; they stay resident and dirty: %w", op.err)
	}
	return nil
}

// take makes page p the caller's, as Cleaning or Evicting, if there is something to be done with it now.
func (o *Object) take(p int64, ret emm.Return, flush bool) bool {
	switch w := o.word(p); {
	case w.Transitional():
		return false
	case w.State() == page.Dirty && ret != emm.ReturnNone, w.State() == page.Clean && w&page.Precious != 0 && ret >= emm.ReturnAll:
		return o.begin(p, page.BeginClean)
	case w.State() == page.Clean && ret == emm.ReturnAnything:
		return o.begin(p, page.BeginReturn)
	case w.State() == page.Clean && flush && ret != emm.ReturnNone:
		return o.begin(p, page.BeginEvict)
	case w.Resident() && flush && ret == emm.ReturnNone:
		return o.begin(p, page.BeginDiscard)
	}
	return false
}

// mustReturn reports whether page p can go only if its contents are returned first.
func (o *Object) mustReturn(p int64) bool {
	w := o.word(p)
	return w.State() == page.Dirty || w.State() == page.Clean && w&page.Precious != 0
}

// unlend gives back a buffer that was not needed.
func (o *Object) unlend(op *lockOp) {
	o.vm.bufs.put(op.buf, &o.lent)
	op.buf = nil
}

func (o *Object) begin(p int64, e page.Event) bool {
	_, _, eff := o.step(p, e)
	return eff != page.Refused
}

// settled waits until page p is nobody's. Whoever owns it needs nothing from us.
func (o *Object) settled(ctx context.Context, p int64) error {
	for wait := 10 * time.Microsecond; o.word(p).Transitional(); wait = min(2*wait, 2*time.Millisecond) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("page out: waiting for page %d, %v: %w", p, o.word(p), context.Cause(ctx))
		case <-time.After(wait):
		}
	}
	return nil
}

// waitFor is wg.Wait with a context.
func waitFor(ctx context.Context, wg *sync.WaitGroup) error {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("page out: waiting for the manager: %w", context.Cause(ctx))
	}
}

// pushRun cleans the Cleaning pages and evicts the Evicting pages of [a, b), all owned by the caller. It returns when all is handed on; an error means that the rest
// was given back.
func (o *Object) pushRun(ctx context.Context, a, b int64, flush bool, op *lockOp) error {
	failpoint.Here("pageout.taken")
	dirty := false
	for p := a; p < b; p++ {
		if o.word(p).State() == page.Cleaning {
			dirty = true
			break
		}
	}
	if dirty {
		for _, m := range *o.maps.Load() {
			m.protect(a, b) // the list is read after the words were taken: whoever was granted access before is in it
		}
	}
	failpoint.Here("pageout.protected")
	var failed error
	for p := a; p < b; {
		s, end := o.word(p).State(), p+1
		for end < b && o.word(end).State() == s {
			end++
		}
		switch {
		case s == page.Evicting:
			o.punch(p, end, op.victims)
		case failed != nil:
			o.notStored(p, end, op.victims)
		default:
			failed = o.giveBack(ctx, p, end, flush, op)
		}
		p = end
	}
	return failed
}

// giveBack returns the contents of pages [a, b), which are Cleaning and protected, to the manager.
func (o *Object) giveBack(ctx context.Context, a, b int64, flush bool, op *lockOp) error {
	bind := o.binding.Load()
	if bind == nil {
		var err error
		if bind, err = o.adoptManager(); err != nil {
			o.notStored(a, b, op.victims)
			return err
		}
	}
	n := int((b - a) << o.shift)
	buf := op.buf
	op.buf = nil
	if len(buf) < n { // it became dirty when it was about to be taken, or lies between others that need none
		o.vm.bufs.put(buf, &o.lent)
		var err error
		if op.daemon() {
			buf, err = o.vm.bufs.tryGet(n, &o.lent)
		} else {
			buf, err = o.vm.bufs.get(ctx, n, &o.lent)
		}
		if err != nil {
			o.notStored(a, b, op.victims)
			return fmt.Errorf("page out: wait for a buffer: %w", err)
		}
	}
	data := buf[:n]
	if err := o.file.ReadAt(data, a<<o.shift); err != nil {
		o.vm.bufs.put(buf, &o.lent)
		o.notStored(a, b, op.victims)
		return fmt.Errorf("page out: read frames: %w", err)
	}
	failpoint.Here("pageout.read")
	// Pages of a vm_allocate object go by data_initialize the first time. Given is set before they are sent, so that contents are never sent
	// as initial again: the manager would ignore them.
	for p := a; p < b; {
		first := bind.def != nil && o.word(p)&given == 0
		end := p
		for end < b && (bind.def != nil && o.word(end)&given == 0) == first {
			if first {
				o.words[end].Or(uint64(given))
			}
			end++
		}
		d := &dataReturn{a: p, b: end, flush: flush, op: op, start: time.Now()}
		if end == b {
			d.buf = buf
		}
		o.send(bind, d, data[(p-a)<<o.shift:(end-a)<<o.shift], first, end == b)
		p = end
	}
	return nil
}

// given marks a page of a vm_allocate object that was handed to the default manager before. It is beside package page's bits and survives every transition.
const given page.Word = 1 << 8

// send is one data_return or data_initialize. The last part of a buffer owns it, others are copied.
func (o *Object) send(bind *binding, d *dataReturn, data []byte, first, owns bool) {
	if !owns {
		data = append([]byte(nil), data...) // rare: first and later hand-overs side by side
	}
	d.op.wg.Add(1)
	d.n, d.counted = int64(o.framesOf(d.b-d.a)), d.op.victims || d.op.own
	if d.counted {
		o.vm.inflight.Add(d.n)
		o.room.leaving.Add(d.n)
	}
	o.reqMu.Lock()
	o.returns = append(o.returns, d)
	o.reqMu.Unlock()
	o.stats.returned.Add(d.b - d.a)
	failpoint.Here("pageout.return")
	var kr emm.KernReturn
	if first {
		kr = bind.def.DataInitialize(bind.head(o), d.a<<o.shift, data)
	} else {
		kr = bind.manager.DataReturn(bind.head(o), d.a<<o.shift, data, true, !d.flush)
	}
	late := !d.over.Load()
	bind.failing.answers(late)
	if late && d.op.victims {
		o.vm.cleaner.dirty.Store(true)
	}
	if kr.Err() != nil { // it dropped the data: nothing will come
		o.control.ReturnCompleted(emm.Run{Off: d.a << o.shift, Size: (d.b - d.a) << o.shift}, kr)
	}
}

// takeReturn finds the return of exactly the pages [a, b).
func (o *Object) takeReturn(a, b int64) *dataReturn {
	o.reqMu.Lock()
	defer o.reqMu.Unlock()
	for i, d := range o.returns {
		if d.a == a && d.b == b {
			o.returns[i] = o.returns[len(o.returns)-1]
			o.returns = o.returns[:len(o.returns)-1]
			d.over.Store(true)
			return d
		}
	}
	return nil
}

// orphanReturns forgets what managers have not completed when the object ends, but for the buffers, which are lent to them.
func (o *Object) orphanReturns() {
	o.reqMu.Lock()
	defer o.reqMu.Unlock()
	for _, d := range o.returns {
		o.landed(d)
	}
}

// landed says that the frames of a return are on their way no more, if they were counted so: they have come, or nobody believes any more that they will. Called with reqMu.
func (o *Object) landed(d *dataReturn) {
	if d.counted {
		d.counted = false
		o.vm.inflight.Add(-d.n)
		o.room.leaving.Add(-d.n)
	}
}

// returned ends a return: the manager has the contents, or not.
func (o *Object) returned(d *dataReturn, result emm.KernReturn) {
	failpoint.Here("pageout.completed")
	switch {
	case result != emm.Success:
		o.vm.counters.notStored.Add(d.b - d.a)
		o.failing().failed(o, result)
		d.runs(o.notStored)
	default:
		o.failing().works(o)
		d.runs(func(a, b int64, victims bool) {
			if d.flush || victims {
				o.evictStored(a, b, victims)
			} else {
				o.finishRun(a, b, page.Stored)
			}
		})
	}
}

// evictStored lets go of the pages [a, b), which are Cleaning, and which the manager has. victims: the policy has forgotten them.
func (o *Object) evictStored(a, b int64, victims bool) {
	for p := a; p < b; {
		end := p
		for end < b && o.storedEvict(end) {
			end++
		}
		if end > p {
			failpoint.Here("pageout.stored")
			o.punch(p, end, victims)
			p = end
			continue
		}
		if victims {
			o.keep(p, p+1)
		}
		p++
	}
}

// notStored ends Cleaning for pages whose contents the manager does not have: they stay resident and dirty. victims: the policy has forgotten them.
func (o *Object) notStored(a, b int64, victims bool) {
	if victims {
		o.vm.policy.Keep(o.frameRun(a, b), int64(o.framesOf(1)))
	}
	o.finishRun(a, b, page.NotStored)
}

// storedEvict reports whether page p is Evicting now; a wired page is Clean instead.
func (o *Object) storedEvict(p int64) bool {
	now, _, eff := o.step(p, page.StoredEvict)
	if eff&page.Wake != 0 {
		o.wake(p, p+1)
	}
	return now.State() == page.Evicting
}

// punch takes the pages [a, b), which are Evicting, out of the file. What will not go (somebody holds the folio) stays charged, and is found again by scrub.
func (o *Object) punch(a, b int64, victims bool) {
	if !victims {
		o.vm.policy.Forget(o.frameRun(a, b))
	}
	left, err := o.file.Punch(a<<o.shift, (b-a)<<o.shift)
	if err != nil {
		o.vm.log.Error("punch", "object", o.id, "off", a<<o.shift, "size", (b-a)<<o.shift, "err", err)
	}
	o.stats.evicted.Add(b - a)
	failpoint.Here("pageout.punched")
	stuck := int64(0)
	if left > 0 {
		stuck = o.strand(a, b)
	}
	o.finishRun(a, b, page.Punched)
	failpoint.Here("pageout.absent")
	o.releaseFrames(int64(o.framesOf(b-a)) - stuck)
}

// destroy drops all resident pages and tells the manager that it is over (memory_object_destroy).
func (o *Object) destroy() {
	if !o.gate.enter() {
		return
	}
	for {
		// What is asked for will not be answered any more. A fault that was on its way may ask once more: again.
		o.answerAll(emm.MemoryFailure)
		ctx, cancel := context.WithTimeout(o.vm.ctx, 10*time.Millisecond)
		err := o.lockRange(ctx, 0, o.npages(), emm.ReturnNone, true)
		cancel()
		if err == nil || o.vm.ctx.Err() != nil || !o.gate.open() {
			break
		}
	}
	for _, m := range *o.maps.Load() {
		m.wake(m.pages())
	}
	o.syncs.end(emm.MemoryFailure)
	o.gate.leave()
	if o.control.initialised.Swap(false) {
		b := o.binding.Load()
		b.manager.Terminate(b.head(o))
	}
}
