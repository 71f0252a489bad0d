package vm

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// Populate makes the bytes [off, off+n) of the mapping (from its beginning) present in it, and writable if write: afterwards a touch does not fault, as long as the
// page is not evicted. It returns early with the reason of the first page that cannot be had, or when ctx ends.
func (m *Mapping) Populate(ctx context.Context, off, n int64, write bool) error {
	o := m.obj
	if off < 0 || n < 0 || off > m.size || n > m.size-off {
		return fmt.Errorf("populate: bytes %d to %d of a mapping of %d: %w", off, off+n, m.size, emm.InvalidArgument)
	}
	if write && m.readOnly {
		return fmt.Errorf("populate: for writing in a read-only mapping: %w", emm.ProtectionFailure)
	}
	if !m.gate.enter() {
		return fmt.Errorf("populate: the mapping is gone: %w", emm.InvalidAddress)
	}
	defer m.gate.leave()
	if !o.gate.enter() {
		return fmt.Errorf("populate: %w", emm.InvalidObject)
	}
	defer o.gate.leave()
	ctx, cancel := o.gate.bound(ctx, emm.InvalidObject)
	defer cancel()
	ctx, cancel = m.gate.bound(ctx, emm.InvalidAddress)
	defer cancel()
	step := o.populateStep()
	if most := o.vm.frames.Budget(); n > most {
		return fmt.Errorf("populate: %d bytes under a budget of %d: %w", n, most, emm.ResourceShortage)
	}
	if most := o.most() * frameSize; most != 0 && n > most {
		return fmt.Errorf("populate: %d bytes of an object of which %d may be resident: %w", n, most, emm.ResourceShortage)
	}
	end := (m.off + off + n + o.pageSize - 1) >> o.shift
	for a := (m.off + off) >> o.shift; a < end; {
		b := min(end, (a+step)&^(step-1))
		if err := m.populateRun(ctx, a, b, write); err != nil {
			return fmt.Errorf("populate: %w", err)
		}
		a = b
	}
	return nil
}

// populateStep is how many pages Populate has resident all at once: a power of two, an extent or a quarter of the budget and of the object's maximum.
func (o *Object) populateStep() int64 {
	step, most := o.extentPages(), o.vm.frames.Budget()/frameSize
	if limit := o.most(); limit != 0 {
		most = min(most, limit)
	}
	for step > 1 && int64(o.framesOf(step)) > most/4 {
		step /= 2
	}
	return step
}

// populateRun does the pages [a, b), of one extent: asks for what is absent, waits for what is somebody's, grants the rest.
func (m *Mapping) populateRun(ctx context.Context, a, b int64, write bool) error {
	o := m.obj
	began := time.Now()
	var asked asking
	tried, best := false, int64(-1)
	for wait := 20 * time.Microsecond; ; wait = min(2*wait, 5*time.Millisecond) {
		absent, resident, busy, short := int64(0), int64(0), false, false
		for p := a; p < b; {
			w := o.word(p)
			switch {
			case o.control.destroyed.Load():
				return emm.MemoryFailure
			case w.State() == page.Error && tried:
				o.reqMu.Lock()
				reason, ok := o.reasons[p]
				o.reqMu.Unlock()
				if !ok {
					reason = emm.MemoryError
				}
				return reason
			case p >= o.limit.Load():
				return emm.MemoryError
			case w.State() == page.Absent || w.State() == page.Error && w&page.Failure == 0:
				got := m.askRun(p, b, &asked, mark{})
				absent += got
				short = short || got == 0
				p += max(1, got)
				continue
			case w.State() == page.Error:
				return emm.MemoryFailure
			case w.Transitional():
				busy = true
			default:
				resident++
			}
			p++
		}
		tried = true
		better := resident > best
		if better {
			best, began, wait = resident, time.Now(), 20*time.Microsecond
		}
		if absent > 0 {
			begun := time.Now()
			if err := waitFor(ctx, &asked.wg); err != nil {
				return err
			}
			if kr := asked.failure.Load(); kr != 0 {
				return emm.KernReturn(kr)
			}
			began = began.Add(time.Since(begun)) // a slow manager is no shortage
			if better {
				continue
			}
		} else if !busy && !short && m.grantRun(a, b, write) {
			return nil
		}
		// What goes as fast as it comes: the run does not fit into the budget, or is not what the task says it mapped.
		if (absent > 0 || short) && time.Since(began) > shortageAfter {
			return emm.ResourceShortage
		}
		switch {
		case short && o.roomFor(int64(o.framesOf(1))):
			o.vm.reclaimFor(ctx, int64(o.framesOf(b-a)))
		case short:
			o.vm.kickNow() // it is the object's maximum, or its account's: others need not give anything
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

// asking is requests that somebody waits for who is no faulting thread.
type asking struct {
	wg      sync.WaitGroup
	failure atomic.Int32 // a KernReturn, the first
}

func (k *asking) failed(reason emm.KernReturn) { k.failure.CompareAndSwap(0, int32(reason)) }

// askRun asks for a run of absent pages that begins at p, and returns its length: 0 without frames, or if p is not absent any more. k is left out of the mapping.
func (m *Mapping) askRun(p, b int64, asked *asking, k mark) int64 {
	o := m.obj
	if o.reserve(1) == 0 {
		return 0
	}
	ev := page.Prefetch
	heal := o.word(p).State() == page.Error
	if heal {
		ev = page.FaultRead
	}
	_, _, eff := o.step(p, ev)
	if eff != page.Request {
		o.release(1)
		if eff&(page.ContinueWP|page.ContinueWrite) != 0 {
			o.end(p, page.Granted) // it was filled in between: nothing was done under Busy
		}
		return 0
	}
	if p >= o.limit.Load() { // it has shrunk meanwhile; who shrinks sets the limit first, and waits for what is Requested
		o.release(1)
		o.end(p, page.Abandon)
		return 0
	}
	end := p + 1
	if !heal {
		_, end = o.extend(p, p, b)
	}
	need := int64(-1)
	if heal {
		need = p
	}
	asked.wg.Add(1)
	o.ask(&request{m: m, a: p, b: end, need: need, f: faulter{ev: page.FaultRead, start: time.Now(), retry: true}, heal: heal, mark: k, failed: asked.failed, done: asked.wg.Done})
	return end - p
}

// grantRun maps the resident pages [a, b) into m. false: some page was not resident, or somebody's: look again.
func (m *Mapping) grantRun(a, b int64, write bool) bool {
	o := m.obj
	if write {
		if !o.freeze.TryRLock() {
			return false // the end of the snapshot may be a while off
		}
		defer o.freeze.RUnlock()
	}
	all := true
	for p := a; p < b; {
		ev, want := page.Around, page.ContinueWP
		if write {
			ev, want = page.FaultWrite, page.ContinueWrite
		}
		end := p
		var clean [maxRun / 64]uint64 // bit i: page p+i was Clean before: the manager has the bytes
		for end < b && end-p < maxRun && o.residentFree(end) {
			_, before, eff := o.step(end, ev)
			if eff != want {
				if eff == page.Request { // evicted in between
					o.end(end, page.Abandon)
				}
				break
			}
			if before.State() == page.Clean {
				clean[(end-p)/64] |= 1 << ((end - p) % 64)
			}
			end++
		}
		if end == p {
			all = false
			p++
			continue
		}
		failpoint.Here("populate.busy")
		e := m.cont(p, end, !write)
		if write && e != 0 && e != unix.EFAULT { // some were mapped already
			m.unprotectRun(p, end)
		}
		if e != unix.EFAULT {
			o.finishRun(p, end, page.Granted)
			p = end
			continue
		}
		// Somebody has taken a page out of the file: find it.
		for q := p; q < end; q++ {
			e := m.cont(q, q+1, !write)
			if write && e == unix.EEXIST {
				m.unprotectRun(q, q+1)
			}
			if e == unix.EFAULT && clean[(q-p)/64]&(1<<((q-p)%64)) != 0 {
				o.vm.policy.Forget(o.frameRun(q, q+1))
				o.release(1)
				o.end(q, page.Lost)
				all = false
				continue
			}
			if e == unix.EFAULT {
				o.refill(m, q, write)
			}
			o.end(q, page.Granted)
		}
		p = end
	}
	return all
}

func (o *Object) residentFree(p int64) bool {
	w := o.word(p)
	return !w.Transitional() && (w.State() == page.Clean || w.State() == page.Dirty)
}
