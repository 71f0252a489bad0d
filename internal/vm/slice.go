package vm

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Who faults now and then waits for the reader of his task to get a CPU, and that is where the time goes when another task faults as fast as it can: on Linux a thread that wakes up where
// another one runs waits until that one has had its slice, and that is noticed with the next tick of the clock, 4 ms and more: a hundred times what a fault takes. So there are two kinds
// of readers, as they take of a CPU. A light one asks for a short slice (sched_setattr(2); before Linux 6.12 that changes nothing): a thread with a shorter slice goes first
// when it wakes up. It gets no more of the CPU by that than its share, and needs no privilege. A busy one has the slice that all threads have: of two short ones neither goes first.
//
// In the kernel nobody goes first but where it allows it, and the copy of an extent into one folio is one piece of work, of milliseconds where memory is slow. So while a light
// reader has faults to serve, the busy ones read ahead less than that.

const (
	shortSlice = 100 * time.Microsecond // the least that the kernel takes
	sliceEvery = 20 * time.Millisecond  // between looks, at least: each is a system call
	busyShare  = 8                      // of a CPU: a reader that takes less is light

	// lightNoted is how exactly it is known when a light reader had a fault, and lightFor how long after it the busy ones keep to what can be interrupted.
	lightNoted = 10 * time.Millisecond
	lightFor   = 100 * time.Millisecond
	// lightAhead of an extent is the most that is read ahead meanwhile.
	lightAhead = 2
)

// slice is how one reader takes its turns: the reader's own, not shared.
type slice struct {
	light bool
	asks  bool          // the kernel lets it choose
	begun time.Time     // of the last look
	used  time.Duration // of a CPU, until then
}

// begin is called by the reader's thread.
func (s *slice) begin() {
	s.asks, s.begun, s.used = true, time.Now(), cpuTime()
	s.set(true)
}

// look finds out, now and then, which kind it is. Called when there are faults to be served.
func (s *slice) look(now time.Time) {
	took := now.Sub(s.begun)
	if took < sliceEvery {
		return
	}
	used := cpuTime()
	if light := used-s.used < took/busyShare; light != s.light {
		s.set(light)
	}
	s.begun, s.used = now, used
}

// set asks for the slice. Where that is forbidden, or the thread is of another class, it stays as it is.
func (s *slice) set(light bool) {
	s.light = light
	if !s.asks {
		return
	}
	a, err := unix.SchedGetAttr(0, 0)
	if err != nil || a.Policy != unix.SCHED_NORMAL && a.Policy != unix.SCHED_BATCH {
		s.asks = false
		return
	}
	if a.Runtime = 0; light { // 0: what is usual
		a.Runtime = uint64(shortSlice)
	}
	s.asks = unix.SchedSetAttr(0, a, 0) == nil
}

// cpuTime is what the calling thread has used of a CPU.
func cpuTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_THREAD, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// turn says that the task's reader has faults to serve.
func (t *Task) turn(now time.Time) {
	t.slice.look(now)
	if l := &t.vm.light; t.slice.light && now.UnixNano()-l.at.Load() > int64(lightNoted) {
		l.task.Store(t.id)
		l.at.Store(now.UnixNano())
	}
}

// yields reports whether the task's reader, which asks, keeps to what can be interrupted.
func (t *Task) yields(now time.Time) bool {
	l := &t.vm.light
	return !t.slice.light && now.UnixNano()-l.at.Load() < int64(lightFor) && l.task.Load() != t.id // which may have been light itself
}

// lightFault is the last that a light reader had to serve, about.
type lightFault struct {
	at   atomic.Int64 // ns since epoch
	task atomic.Uint64
}
