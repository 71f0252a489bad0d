package vm

import (
	"context"
	"fmt"
	"time"

	"machpager/internal/failpoint"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// Discard throws the contents of the whole pages inside the bytes [off, off+n) away: they read as zeros again, and what the manager stored of them is freed. To the
// manager it looks like a data_return of zeros, which the default pager stores as nothing. Wired pages are an error; pages
// that are lost for ever (MemoryFailure) stay so. It takes time in proportion to what was ever touched of the range; of an object that is not ObjectOptions.Fresh to the
// range itself, for what its manager had before nobody here knows.
func (o *Object) Discard(ctx context.Context, off, n int64) error {
	if off < 0 || n < 0 || off > o.size || n > o.size-off {
		return fmt.Errorf("discard: bytes %d to %d of an object of %d: %w", off, off+n, o.size, emm.InvalidArgument)
	}
	if !o.gate.enter() {
		return fmt.Errorf("discard: %w", emm.InvalidObject)
	}
	defer o.gate.leave()
	if err := o.ready(); err != nil { // never mapped so far: the manager must know the object to forget parts of it
		return fmt.Errorf("discard: %w", err)
	}
	ctx, cancel := o.gate.bound(ctx, emm.InvalidObject)
	defer cancel()
	if err := o.vm.live(ctx); err != nil {
		return fmt.Errorf("discard: %w", err)
	}
	a, b := (off+o.pageSize-1)>>o.shift, (off+n)>>o.shift
	op := &lockOp{}
	limit := o.extentPages()
	walk := touched{o: o}
	for p := a; p < b; {
		stop := b
		if o.fresh {
			if p = walk.next(p, b); p == b {
				break
			}
			stop = min(b, walk.end) // taking a page writes its word: beyond, that would be one that nobody ever wrote
		}
		if ctx.Err() != nil {
			return fmt.Errorf("discard: %w", context.Cause(ctx))
		}
		end := p
		for end < stop && end-p < limit && o.takeAny(end) {
			end++
		}
		if end > p {
			failpoint.Here("discard.taken")
			o.throwAway(p, end, op)
			p = end
			continue
		}
		w := o.word(p)
		if w.Wired() > 0 {
			waitFor(ctx, &op.wg)
			return fmt.Errorf("discard: page %d is wired: %w", p, emm.InvalidArgument)
		}
		if w.State() == page.Error && w&page.Failure != 0 {
			p++
			continue
		}
		if err := o.settled(ctx, p); err != nil {
			return err
		}
	}
	if err := waitFor(ctx, &op.wg); err != nil {
		return err
	}
	op.mu.Lock()
	defer op.mu.Unlock()
	if op.err != emm.Success {
		return fmt.Errorf("discard: the manager could not forget the contents: %w", op.err)
	}
	return nil
}

// takeAny makes page p the caller's: Cleaning if it is resident, Evicting if there is nothing of it; unless somebody owns it or it is wired.
func (o *Object) takeAny(p int64) bool {
	switch w := o.word(p); {
	case w.Wired() > 0:
		return false
	case w.State() == page.Absent:
		return o.begin(p, page.Claim)
	case w.State() == page.Error:
		if o.stepFrom(p, page.Error, page.FaultRead) != page.Request { // ours, as for a request
			return false
		}
		o.end(p, page.Abandon)
		return o.begin(p, page.Claim)
	}
	return o.begin(p, page.BeginReturn)
}

// throwAway has the manager forget the pages [a, b), which are the caller's, before anybody can ask for them.
func (o *Object) throwAway(a, b int64, op *lockOp) {
	for _, m := range *o.maps.Load() {
		m.protect(a, b) // if the manager fails, what is resident stays, and must not have changed unseen
	}
	d := &dataReturn{a: a, b: b, op: op, start: time.Now(), discard: true}
	op.wg.Add(1)
	bind := o.binding.Load()
	if bind == nil {
		o.discarded(d, emm.Success)
		op.done(emm.Success)
		return
	}
	o.reqMu.Lock()
	o.returns = append(o.returns, d)
	o.reqMu.Unlock()
	if kr := bind.manager.DataReturn(bind.head(o), a<<o.shift, o.vm.zero[:(b-a)<<o.shift], true, false); kr.Err() != nil {
		o.control.ReturnCompleted(emm.Run{Off: a << o.shift, Size: (b - a) << o.shift}, kr)
	}
}

// discarded ends a discard. Pages that were absent are so again; resident ones go, or stay as they were if the manager could not forget them.
func (o *Object) discarded(d *dataReturn, result emm.KernReturn) {
	failpoint.Here("discard.told")
	for p := d.a; p < d.b; {
		s, end := o.word(p).State(), p+1
		for end < d.b && o.word(end).State() == s {
			end++
		}
		switch {
		case s == page.Evicting:
			if _, err := o.punchAbsent(p, end); err != nil { // what a task's own hand put there
				o.vm.log.Error("discard: punch", "object", o.id, "err", err)
			}
			failpoint.Here("discard.punched")
			o.finishRun(p, end, page.Punched)
		case result != emm.Success:
			o.notStored(p, end, d.op.victims)
		default:
			for q := p; q < end; q++ {
				if o.storedEvict(q) {
					o.punch(q, q+1, d.op.victims)
				} else if _, _, eff := o.step(q, page.FaultWP); eff == page.Unprotect {
					o.end(q, page.Granted) // wired meanwhile: it keeps its contents, which the manager has no more
				}
			}
		}
		p = end
	}
}
