package vm

import (
	"errors"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/vm/page"
	"machpager/uffd"
)

// read is the task's fault reader: one thread that polls, reads messages in batches, and decides each. It never waits for anything but
// messages.
func (t *Task) read() {
	runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
	defer close(t.done)
	fds := []unix.PollFd{{Fd: int32(t.fd.Fd()), Events: unix.POLLIN}, {Fd: int32(t.stop), Events: unix.POLLIN}}
	batch := make([]uffd.Msg, 0, 128)
	place := newPlacement(t.pid)
	t.slice.begin()
	idle := 0
	for !t.ended.Load() {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			t.vm.log.Error("fault reader: poll", "task", t.id, "pid", t.pid, "err", err)
			return
		}
		if fds[1].Revents != 0 {
			var b [8]byte
			unix.Read(t.stop, b[:])
		}
		if fds[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0 {
			// Not of this task's doing alone: POLLERR comes from a descriptor that was made blocking behind our back.
			if unix.SetNonblock(t.fd.Fd(), true) != nil {
				return
			}
		}
		for {
			batch = t.drain(batch[:0], true)
			if len(batch) == 0 {
				// Somebody else drained, or an event was all there was. A descriptor that says so without end must not take a CPU.
				if idle++; idle > 1000 {
					time.Sleep(time.Millisecond)
				}
				break
			}
			idle = 0
			t.serving.Store(true)
			start := time.Now()
			t.turn(start)
			for i := range batch {
				t.message(&batch[i], start)
				place.fault(batch[i].ThreadID())
			}
			t.serving.Store(false)
			if len(batch) < len(t.msgs) {
				break // read(2) hands out all there is: the next poll tells of more
			}
		}
	}
}

// drain reads what the kernel has for us. Events are applied at once, before any fault that was read with them is served: while an event is unread
// every fill fails with EAGAIN, so whoever meets EAGAIN drains, and leaves the faults to the reader.
func (t *Task) drain(into []uffd.Msg, reader bool) []uffd.Msg {
	t.drainMu.Lock()
	defer t.drainMu.Unlock()
	if t.gone {
		return into
	}
	if reader && len(t.pending) > 0 {
		into = append(into, t.pending...)
		t.pending = t.pending[:0]
	}
	n, err := t.fd.Read(t.msgs)
	if err != nil {
		t.stats.readErrors.Add(1)
	}
	for i := range n {
		switch m := &t.msgs[i]; m.Event() {
		case uffd.EventPagefault:
			if reader {
				into = append(into, *m)
			} else {
				t.pending = append(t.pending, *m)
			}
		case uffd.EventRemap:
			t.moved(m.From(), m.To(), m.Length())
			t.stats.events.Add(1)
		default: // not asked for by region; a fork's descriptor is the only thing that must not be lost
			if m.Event() == uffd.EventFork {
				unix.Close(m.Fd())
			}
			t.stats.events.Add(1)
		}
	}
	if !reader && len(t.pending) > 0 {
		t.poke()
	}
	return into
}

// again is what to do about EAGAIN: an event is unread, or the address space is just changing.
func (t *Task) again() {
	if t != nil {
		t.drain(nil, false)
	}
	runtime.Gosched()
}

// message serves one page fault.
func (t *Task) message(msg *uffd.Msg, start time.Time) {
	m, off := t.find(msg.Address())
	if m == nil {
		t.stranger(msg.Address())
		return
	}
	defer m.gate.leave()
	ev := page.FaultRead
	switch f := msg.Flags(); {
	case m.readOnly: // a write there makes a private copy, which is the task's own
	case f&uffd.FaultWP != 0:
		ev = page.FaultWP
	case f&uffd.FaultWrite != 0:
		ev = page.FaultWrite
	}
	m.fault(off>>m.obj.shift, faulter{ev: ev, tid: msg.ThreadID(), start: start})
}

// stranger answers a fault at an address we know nothing of: unmapped meanwhile, or registered by the task for something else. It must not hang: a page that
// is still there is poisoned.
func (t *Task) stranger(addr uint64) {
	addr &^= frameSize - 1
	t.stats.strangers.Add(1)
	if _, err := t.fd.Poison(addr, frameSize, 0); err != nil {
		t.fd.Wake(addr, frameSize)
	}
}
