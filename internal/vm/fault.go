package vm

import (
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/internal/vm/page"
	"machpager/uffd"
)

// faulter is who faulted, and how.
type faulter struct {
	ev    page.Event // FaultRead, FaultWrite or FaultWP
	tid   uint32     // the thread, as its task numbers it
	retry bool       // not the first attempt: the pattern of faults has been learned from
	start time.Time  // when the message was read
}

// touched tells who must know that a resident page was used. The caller owns Busy.
func (o *Object) touched(m *Mapping, p int64, f faulter) {
	o.vm.policy.Touch(o.id, p<<o.shift/frameSize)
	o.used(p)
	o.vm.token.got(m.task, f.tid, o, p)
}

// fault decides one page fault in m, which the caller has entered. The message is a hint: the word says what is to be done, and what cannot be done now is
// left to who owns the page.
func (m *Mapping) fault(p int64, f faulter) {
	o := m.obj
	at := f.start
	if f.retry {
		at = time.Now() // it was put aside then: the token's holder may have been idle since
	}
	o.vm.token.asks(m.task, f.tid, at)
	if !o.gate.enter() {
		m.poison(p) // the object was destroyed under its mappings
		return
	}
	defer o.gate.leave()
	if o.control.destroyed.Load() {
		m.poison(p)
		return
	}
	if f.ev != page.FaultRead && !o.freeze.TryRLock() {
		m.stats.dropped.Add(1) // the end of the snapshot wakes
		return
	}
	before, eff := m.resident(p, f)
	if f.ev != page.FaultRead {
		o.freeze.RUnlock() // the manager is asked without it, and who fills for a write takes it again
	}
	if eff == page.Request {
		o.request(m, p, f, before.State() == page.Error)
	}
}

// resident decides a fault on page p, and does what is to be done unless the manager is to be asked. The caller holds the object's freeze if the page may become Dirty.
func (m *Mapping) resident(p int64, f faulter) (before page.Word, eff page.Effect) {
	o := m.obj
	for {
		_, before, eff = o.step(p, f.ev)
		switch eff {
		case page.Wait:
			m.stats.dropped.Add(1)
			return
		case page.Request:
			return
		case page.Poison:
			m.poison(p)
			return
		case page.Unprotect:
			o.touched(m, p, f)
			failpoint.Here("fault.busy")
			end := m.dirtyAhead(p, f)
			m.stats.writeProtect.Add(1) // before the thread is woken
			m.unprotectRun(p, end)
			failpoint.Here("fault.unprotected")
			o.finishRun(p, end, page.Granted)
			m.latency(f.start)
			return
		case page.ContinueWP, page.ContinueWrite:
			o.touched(m, p, f)
			m.stats.minor.Add(1)
			if m.grant(p, before, eff == page.ContinueWrite, f) {
				m.latency(f.start)
				if depth := m.marks.hit(p); depth > 0 && eff == page.ContinueWP && !f.retry {
					m.marked(p, depth)
				}
				return
			}
			m.stats.minor.Add(-1)
		default:
			o.vm.bug("object %d page %d: fault %v in %v: effect %d", o.id, p, f.ev, before, eff)
			return
		}
	}
}

// grant maps the resident page p, Busy and owned by the caller, into m, with neighbours that are resident too. false: it turned out not to be in the
// file, and is Absent now.
func (m *Mapping) grant(p int64, before page.Word, write bool, f faulter) bool {
	o := m.obj
	a, b := m.around(p, f)
	e := m.cont(a, b, !write || b-a > 1)
	failpoint.Here("fault.continued")
	if write && (b-a > 1 || e == unix.EEXIST) {
		m.unprotect(p)
	}
	o.finishRun(a, p, page.Granted)
	o.finishRun(p+1, b, page.Granted)
	if e != unix.EFAULT || b-a > 1 && m.cont(p, p+1, !write) != unix.EFAULT {
		o.end(p, page.Granted)
		return true
	}
	// A task that may write has taken the page out of the file.
	if before.State() == page.Clean {
		o.vm.policy.Forget(o.frameRun(p, p+1))
		o.release(1)
		o.end(p, page.Lost) // the manager has the bytes
		return false
	}
	o.refill(m, p, write)
	o.end(p, page.Granted)
	m.wake(p, p+1)
	return true
}

// refill puts zeros where a task that may write has taken a dirty page out of the file: its contents are gone, as after any hole punched in a shared
// file. What frames of the page are still there keep theirs. The caller owns Busy.
func (o *Object) refill(m *Mapping, p int64, write bool) {
	o.vm.counters.thrownAway.Add(1)
	to := m
	if m.readOnly {
		own, err := o.ownMapping()
		if err != nil {
			o.vm.log.Error("fill for a read-only mapping", "object", o.id, "err", err)
			return
		}
		to = own
	}
	to.each(p, p+1, func(addr uint64, off, n int64) bool {
		_, e := o.copyTo(to, addr, off, o.vm.zero[:n], uffd.CopyWP|uffd.CopyDontWake, true)
		if e == unix.ENOMEM || e == unix.ENOSPC {
			o.vm.noFrame() // the thread comes again
		}
		return e == 0
	})
	m.cont(p, p+1, true) // what was there all the time
	if write {
		m.unprotect(p)
	}
}
