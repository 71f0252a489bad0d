//go:build linux

package uffd

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Read takes as many messages as are there and fit, with one read(2). On a non-blocking userfaultfd (the default) it returns 0, nil when
// there are none; poll(2) tells when there are. The kernel hands out page faults before events.
//
// A message is a hint, not an obligation: one comes for each thread that waits on a page, and again whenever a signal interrupts the wait.
// An event must be taken out soon: whoever caused it waits, and every fill fails with EAGAIN. The descriptor in an EventFork belongs to
// the reader, who must adopt or close it.
func (u *FD) Read(msgs []Msg) (int, error) {
	if !u.acquire() {
		return 0, fail("read", 0, 0, unix.EBADF)
	}
	defer u.done()
	if len(msgs) == 0 {
		return 0, nil
	}
	for {
		read := readNow
		if u.blocking || u.noNowait.Load() {
			read = readMsgs
		}
		n, errno := read(u.fd, msgs)
		switch errno {
		case 0:
			return n, nil
		case unix.EOPNOTSUPP, unix.ENOSYS, unix.ESPIPE:
			// The kernel is older than 6.10, or this is no userfaultfd at all, which says nothing of the others.
			if u.noNowait.Swap(true) {
				return 0, fail("read", 0, 0, errno)
			}
		case unix.EAGAIN:
			return 0, nil
		case unix.EINTR:
			if u.users.Load() < 0 {
				return 0, fail("read", 0, 0, unix.EBADF)
			}
		default:
			return 0, fail("read", 0, 0, errno)
		}
	}
}

// Event tells the kind of the message, and so which of the other methods make sense.
func (m *Msg) Event() Event { return m.event }

// Flags tells what kind of fault an EventPagefault is.
func (m *Msg) Flags() FaultFlags { return FaultFlags(m.arg[0]) }

// Address is where an EventPagefault happened: the page, or with FeatureExactAddress the byte.
func (m *Msg) Address() uint64 { return m.arg[1] }

// ThreadID is the thread that made an EventPagefault, as its own PID namespace numbers it; 0 without FeatureThreadID.
func (m *Msg) ThreadID() uint32 { return m.arg32(2) }

// Fd is the userfaultfd of the child after an EventFork, now open in this process, with the flags of the parent's.
func (m *Msg) Fd() int { return int(m.arg32(0)) }

// From is where the range of an EventRemap was.
func (m *Msg) From() uint64 { return m.arg[0] }

// To is where the range of an EventRemap is now.
func (m *Msg) To() uint64 { return m.arg[1] }

// Length is the size of the range of an EventRemap in bytes.
func (m *Msg) Length() uint64 { return m.arg[2] }

// Start is the first byte of the range of an EventRemove (the pages went, the mapping stays) or EventUnmap.
func (m *Msg) Start() uint64 { return m.arg[0] }

// End is the first byte behind the range of an EventRemove or EventUnmap.
func (m *Msg) End() uint64 { return m.arg[1] }

// String describes the message in one line.
func (m *Msg) String() string {
	switch m.event {
	case EventPagefault:
		return fmt.Sprintf("%v fault at %#x by thread %d", m.Flags(), m.Address(), m.ThreadID())
	case EventFork:
		return fmt.Sprintf("fork, fd %d", m.Fd())
	case EventRemap:
		return fmt.Sprintf("remap %#x+%d to %#x", m.From(), m.Length(), m.To())
	case EventRemove, EventUnmap:
		return fmt.Sprintf("%v [%#x, %#x)", m.event, m.Start(), m.End())
	}
	return m.event.String()
}

func (e Event) String() string {
	switch e {
	case EventPagefault:
		return "pagefault"
	case EventFork:
		return "fork"
	case EventRemap:
		return "remap"
	case EventRemove:
		return "remove"
	case EventUnmap:
		return "unmap"
	}
	return fmt.Sprintf("event %#x", uint8(e))
}

// String reads "missing read", "missing write", "minor read", "minor write" or "write-protect".
func (f FaultFlags) String() string {
	access := "read"
	if f&FaultWrite != 0 {
		access = "write"
	}
	switch {
	case f&FaultWP != 0:
		return "write-protect"
	case f&FaultMinor != 0:
		return "minor " + access
	}
	return "missing " + access
}
