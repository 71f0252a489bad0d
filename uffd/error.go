//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrNotSupported matches (errors.Is) what Have, its kin and Open return for a feature that this kernel does not have.
var ErrNotSupported = errors.New("not supported by this kernel")

// Error is what every method of FD returns when the kernel refuses.
type Error struct {
	Op         string     // the method in lower case: "copy"
	Start, Len uint64     // the range in bytes; both 0 for operations without one
	Errno      unix.Errno // never 0; EBADF: closed
}

// Error reads "copy 0x7f0000001000+4096 by userfaultfd: file exists", with the remedy where the errno alone would puzzle.
func (e *Error) Error() string {
	what := e.Op
	if e.Start != 0 || e.Len != 0 {
		what = fmt.Sprintf("%s %#x+%d", e.Op, e.Start, e.Len)
	}
	return fmt.Sprintf("%s by userfaultfd: %v%s", what, e.Errno, remedy(e.Op, e.Errno))
}

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Errno }

// Is makes errors.Is(err, os.ErrClosed) true for operations on a closed FD.
func (e *Error) Is(target error) bool { return target == os.ErrClosed && e.Errno == unix.EBADF }

func remedy(op string, errno unix.Errno) string {
	switch {
	case op == "register" && errno == unix.EPERM:
		return " (a shared mapping of a file opened read-only: open it read-write, or map it MAP_PRIVATE)"
	case op == "register" && errno == unix.EINVAL:
		return " (not whole pages, or not anonymous, shared or hugetlb memory, or a mode this kernel has not got for it: see Have)"
	case op == "register" && errno == unix.EBUSY:
		return " (the memory is registered with another userfaultfd)"
	case errno == unix.EAGAIN:
		return " (read the pending events, then go on after the bytes done)"
	case errno == unix.ENOENT:
		return " (no mapping registered with this userfaultfd covers the range)"
	case errno == unix.ESRCH:
		return " (the process of the memory is gone)"
	case errno == unix.EBADF:
		return " (the userfaultfd is closed)"
	}
	return ""
}
