//go:build linux

package uffd

import (
	"errors"
	"math"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// FD is a userfaultfd. Open and FromFd make one; the zero value is not usable.
type FD struct {
	fd       int           // immutable
	features Features      // immutable
	blocking bool          // immutable: without O_NONBLOCK a Read may wait for ever
	noNowait atomic.Bool   // set when the kernel turned down a read with RWF_NOWAIT
	users    atomic.Int64  // calls under way; less than 0: closing, then closing+users
	released chan struct{} // closed when the descriptor is
	closeErr error         // guarded by released: written before, read after
}

// closing is added to users by the first Close.
const closing = math.MinInt64

func newFD(fd int, f Features, blocking bool) *FD {
	return &FD{fd: fd, features: f, blocking: blocking, released: make(chan struct{})}
}

// FromFd takes ownership of fd, a userfaultfd that was received from another process or in a fork event. The handshake has been made
// already by whoever opened it. The descriptor's O_NONBLOCK is left as it is.
func FromFd(fd int) *FD {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	return newFD(fd, 0, err == nil && flags&unix.O_NONBLOCK == 0)
}

// FromFdNonblock is FromFd, and Reads never wait, whatever anybody who has the userfaultfd makes of its O_NONBLOCK, before this call or at any time after. It
// sets O_NONBLOCK, for kernels older than 6.10, which have no other way.
func FromFdNonblock(fd int) *FD {
	unix.SetNonblock(fd, true) // it fails for no userfaultfd, and Read says so
	return newFD(fd, 0, false)
}

// Fd returns the descriptor's number, for poll(2) or to send it to another process. It is valid until Close.
func (u *FD) Fd() int { return u.fd }

// Features returns the features that Open enabled; 0 for FromFd, where nobody can tell.
func (u *FD) Features() Features { return u.features }

// Close closes the descriptor after all calls under way have returned; calls that begin later fail with EBADF (os.ErrClosed). Further Closes
// wait like the first and return the same.
//
// When it was the last copy, the kernel unregisters all its memory and wakes every thread that waits: they go on with pages of zeros.
//
// On a blocking userfaultfd a Read may wait for ever, and nothing can wake it: there Close does not wait, and the last call that
// returns closes the descriptor.
func (u *FD) Close() error {
	for {
		n := u.users.Load()
		if n < 0 {
			break
		}
		if u.users.CompareAndSwap(n, closing+n) {
			if n == 0 {
				u.release()
			}
			break
		}
	}
	if u.blocking {
		select {
		case <-u.released:
			return u.closeErr
		default:
			return nil
		}
	}
	<-u.released
	return u.closeErr
}

func (u *FD) release() {
	var errno unix.Errno
	if errors.As(unix.Close(u.fd), &errno) {
		u.closeErr = fail("close", 0, 0, errno)
	}
	close(u.released)
}

// acquire makes Close wait until done; false when the FD is closed.
func (u *FD) acquire() bool {
	for {
		n := u.users.Load()
		if n < 0 {
			return false
		}
		if u.users.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (u *FD) done() {
	if u.users.Add(-1) == closing {
		u.release()
	}
}
