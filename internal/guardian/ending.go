package guardian

import (
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/uffd"
)

const (
	pageSize = 4096    // bytes; what a fault is answered with
	step     = 2 << 20 // bytes poisoned at once: what one page table covers; the task's memory map is locked meanwhile
	// eagerMax bounds what is poisoned before anybody touches it, in bytes of address space of all tasks together: every 2 MiB costs
	// the task a page table of 4 KiB. What is beyond is poisoned when touched.
	eagerMax = 16 << 30
	// maxEndings bounds the tasks that are served at once: each costs a thread and a descriptor. A task that leaves the pager again and again while its memory
	// lives on could have as many as it likes.
	maxEndings = 512
	// lookEvery is how often the guardian looks whether a task is gone, in ms.
	lookEvery = 500
	// Where a task can have memory at all: vm.mmap_min_addr to TASK_SIZE with four levels of page tables.
	lowest, highest = 64 << 10, 1<<47 - pageSize
)

// allowance is a number of bytes that several may use up together.
type allowance struct{ left atomic.Int64 }

func newAllowance(n int64) *allowance {
	a := &allowance{}
	a.left.Store(n)
	return a
}

// take reports whether n bytes were left, and takes them.
func (a *allowance) take(n uint64) bool {
	if int64(n) < 0 || a.left.Add(-int64(n)) < 0 {
		a.left.Add(int64(n))
		return false
	}
	return true
}

// ending answers for one task whose pager is gone: see the package comment. serve and ahead run at the same time, each once.
type ending struct {
	fd   *uffd.FD // immutable
	log  *slog.Logger
	over atomic.Bool // the task is gone
	quit atomic.Bool // there are too many: see table.retire
	all  atomic.Bool // all that was absent is poisoned

	mu     sync.Mutex
	ranges []Range // guarded by mu; by length. A remap changes them
}

func newEnding(fd *uffd.FD, ranges []Range, log *slog.Logger) *ending {
	e := &ending{fd: fd, log: log, ranges: ranges}
	slices.SortFunc(e.ranges, func(a, b Range) int {
		switch {
		case a.Len < b.Len:
			return -1
		case a.Len > b.Len:
			return 1
		}
		return 0
	})
	return e
}

// complete reports whether nothing would change if the guardian went now.
func (e *ending) complete() bool { return e.all.Load() || e.over.Load() }

func (e *ending) close() { e.fd.Close() }

func (e *ending) list() []Range {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.ranges)
}

// serve answers faults until the task is gone or has unmapped everything.
func (e *ending) serve() {
	defer e.over.Store(true)
	e.fd.Wake(lowest, highest-lowest) // all there can be: the ranges may have been moved since
	if e.gone() {
		return // a task that was killed, most often
	}
	var (
		msgs  [32]uffd.Msg
		again []uffd.Msg // faults that met an event in the queue
		look  = time.Now()
	)
	for {
		n, err := e.fd.Read(msgs[:])
		if err != nil {
			e.log.Error("cannot read a task's faults any more", "err", err)
			return
		}
		retry := again
		again = nil
		for _, m := range append(retry, msgs[:n]...) {
			if m.Event() != uffd.EventPagefault {
				e.event(&m)
				continue
			}
			switch err := e.answer(&m); {
			case errors.Is(err, unix.ESRCH):
				return
			case err != nil:
				again = append(again, m)
			}
		}
		if now := time.Now(); now.Sub(look) >= lookEvery*time.Millisecond {
			if look = now; e.quit.Load() || e.gone() {
				return
			}
		}
		if n == len(msgs) {
			continue
		}
		timeout := lookEvery
		if len(again) > 0 {
			timeout = 1
		}
		p := [...]unix.PollFd{{Fd: int32(e.fd.Fd()), Events: unix.POLLIN}}
		unix.Poll(p[:], timeout)
		if p[0].Revents&unix.POLLERR != 0 {
			unix.SetNonblock(e.fd.Fd(), true)
		}
	}
}

// answer ends one fault. An error is ESRCH, or asks for one more try.
func (e *ending) answer(m *uffd.Msg) error {
	page := m.Address() &^ (pageSize - 1)
	if m.Flags()&uffd.FaultWP != 0 {
		return e.again(page, e.fd.WriteProtect(page, pageSize, 0))
	}
	_, err := e.fd.Poison(page, pageSize, 0)
	if errors.Is(err, unix.EEXIST) {
		// A page, a marker of ours, or a write-protect marker: only the last goes away now.
		e.fd.WriteProtect(page, pageSize, uffd.WriteProtectDontWake)
		_, err = e.fd.Poison(page, pageSize, 0)
	}
	return e.again(page, err)
}

// again passes on the errors that matter. After the others (the page is there, its mapping is not) the thread needs a wake and looks for itself.
func (e *ending) again(page uint64, err error) error {
	if err == nil || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EAGAIN) {
		return err
	}
	e.fd.Wake(page, pageSize)
	return nil
}

// event takes note of what the task does with its address space.
func (e *ending) event(m *uffd.Msg) {
	switch m.Event() {
	case uffd.EventRemap:
		from, to, n := m.From(), m.To(), m.Length()
		e.mu.Lock()
		for i, r := range e.ranges {
			if r.Start >= from && r.Start-from < n {
				e.ranges[i].Start = to + (r.Start - from)
			}
		}
		e.mu.Unlock()
		e.fd.Wake(to, n)
	case uffd.EventFork:
		// Nobody asks for this event. Closing the child's userfaultfd would give it zeros for data: it stays open as long as the guardian.
		e.log.Error("a task was forked with its mappings: faults of the child are not answered", "fd", m.Fd())
	}
}

// gone reports whether the task's address space has ended or has none of the ranges any more. The ranges are tried whole, and at both ends, for
// the kernel tells no more than whether a range begins with registered memory. In doubt it is not gone: the cost is a waiting guardian.
func (e *ending) gone() bool {
	left := false
	for _, r := range e.list() {
		for _, p := range [...]uint64{r.Start, r.Start + r.Len - pageSize} {
			_, err := e.fd.Poison(p, pageSize, uffd.PoisonDontWake)
			switch {
			case errors.Is(err, unix.ESRCH):
				return true
			case !errors.Is(err, unix.ENOENT):
				left = true
			}
		}
	}
	return !left
}

// ahead poisons what is absent before anybody touches it.
func (e *ending) ahead(left *allowance) {
	all := true
	for _, r := range e.list() {
		if e.over.Load() {
			return
		}
		if !left.take(r.Len) {
			all = false
			continue
		}
		e.poison(r)
	}
	if all {
		e.all.Store(true)
	}
}

// poison poisons all of one range but the pages that are present.
func (e *ending) poison(r Range) {
	end := r.Start + r.Len
	for p := r.Start; p < end && !e.over.Load(); {
		next := min(p&^(step-1)+step, end)
		for {
			err := e.fd.WriteProtect(p, next-p, 0)
			if !errors.Is(err, unix.EAGAIN) || e.over.Load() {
				break // ENOENT: read-only, or not there any more
			}
			time.Sleep(time.Millisecond)
		}
		for p < next && !e.over.Load() {
			done, err := e.fd.Poison(p, next-p, 0)
			p += uint64(done)
			switch {
			case err == nil || done > 0:
			case errors.Is(err, unix.EEXIST):
				p += pageSize
			case errors.Is(err, unix.EAGAIN):
				time.Sleep(time.Millisecond) // until serve has read the event
			case errors.Is(err, unix.ESRCH):
				return
			default: // unmapped, or not a mapping of ours any more; whoever touches what is left of it is answered by serve
				p = next
			}
		}
	}
}
