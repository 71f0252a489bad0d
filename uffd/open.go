//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// DevicePath is the device that makes userfaultfds for whoever may open it. Linux 6.1.
const DevicePath = "/dev/userfaultfd"

// OpenOptions says what Open makes. nil and the zero value: a non-blocking userfaultfd without any feature, for faults in user and in kernel mode.
type OpenOptions struct {
	Features     Features // all are enabled, or Open fails with ErrNotSupported naming what is missing
	Optional     Features // enabled as far as the kernel has them
	UserModeOnly bool     // needs no privilege; but a system call that meets a missing page fails with EFAULT. Linux 5.11
	Device       *os.File // an open /dev/userfaultfd, perhaps received from a process that was allowed to open it; nil: open it here
	Blocking     bool     // no O_NONBLOCK: Read waits, poll(2) reports POLLERR
}

// Open makes a userfaultfd for the memory of the calling process: by o.Device, else by /dev/userfaultfd, else by the system call
// userfaultfd(2); then it makes the API handshake. The descriptor is always close-on-exec.
//
// Errors are errors.Is ErrNotSupported, or wrap the errno: EPERM (with what would help), EMFILE, ENOSYS.
func Open(o *OpenOptions) (*FD, error) {
	if o == nil {
		o = &OpenOptions{}
	}
	want := o.Features
	if o.Features|o.Optional != 0 {
		got, err := query(o)
		if err != nil {
			return nil, fmt.Errorf("open userfaultfd: %w", err)
		}
		if err := (o.Features &^ got).missing(); err != nil {
			return nil, fmt.Errorf("open userfaultfd: %w", err)
		}
		want |= o.Optional & got
	}
	fd, err := create(o)
	if err != nil {
		return nil, fmt.Errorf("open userfaultfd: %w", err)
	}
	if _, _, errno := ioctlAPI(fd, apiVersion, want); errno != 0 {
		unix.Close(fd)
		if errno == unix.EPERM && want&FeatureEventFork != 0 {
			return nil, fmt.Errorf("open userfaultfd: enable EVENT_FORK: %w (run as root or with CAP_SYS_PTRACE)", errno)
		}
		return nil, fmt.Errorf("open userfaultfd: enable %v: %w", want, errno)
	}
	return newFD(fd, want, o.Blocking), nil
}

// create makes a userfaultfd before its handshake.
func create(o *OpenOptions) (int, error) {
	flags := uintptr(unix.O_CLOEXEC)
	if !o.Blocking {
		flags |= unix.O_NONBLOCK
	}
	if o.UserModeOnly {
		flags |= userModeOnly
	}
	if o.Device != nil {
		return fromDevice(o.Device, flags)
	}
	dev, devErr := os.OpenFile(DevicePath, os.O_RDWR, 0) // as a File for its O_CLOEXEC and its handling of EINTR
	if devErr == nil {
		defer dev.Close()
		var fd int
		if fd, devErr = fromDevice(dev, flags); devErr == nil {
			return fd, nil
		}
	}
	fd, errno := userfaultfd(flags)
	switch {
	case errno == 0:
		return fd, nil
	case errno == unix.EPERM && o.UserModeOnly:
		return -1, fmt.Errorf("%w (not even for user mode only: a seccomp filter, perhaps of a container, forbids userfaultfd(2))", errno)
	case errno == unix.EPERM:
		return -1, fmt.Errorf("%w (run as root or with CAP_SYS_PTRACE, or give read and write permission on %s%s, or set the sysctl "+
			"vm.unprivileged_userfaultfd=1, or ask for UserModeOnly%s)", errno, DevicePath, notThere(devErr), filtered())
	case errno == unix.ENOSYS:
		return -1, fmt.Errorf("%w (a kernel without CONFIG_USERFAULTFD): %w", errno, ErrNotSupported)
	case errno == unix.EINVAL && o.UserModeOnly:
		return -1, fmt.Errorf("user mode only (Linux 5.11): %w: %w", errno, ErrNotSupported)
	}
	return -1, errno
}

func fromDevice(dev *os.File, flags uintptr) (int, error) {
	raw, err := dev.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, errno := -1, unix.Errno(0)
	// Control holds the descriptor while it is used; it fails only if the file is closed.
	if err := raw.Control(func(d uintptr) { fd, errno = ioctlNew(int(d), flags) }); err != nil {
		return -1, fmt.Errorf("by %s: %w", dev.Name(), os.ErrClosed)
	}
	switch errno {
	case 0:
		return fd, nil
	case unix.ENOTTY, unix.EINVAL:
		return -1, fmt.Errorf("by %s: %w (not an open %s)", dev.Name(), errno, DevicePath)
	}
	return -1, fmt.Errorf("by %s: %w", dev.Name(), errno)
}

// filtered says that a seccomp filter may be the cause, if this process has one: proc_pid_status(5), mode 2.
func filtered() string {
	b, err := os.ReadFile("/proc/thread-self/status")
	if _, rest, ok := strings.Cut(string(b), "\nSeccomp:\t"); err != nil || !ok || !strings.HasPrefix(rest, "2") {
		return ""
	}
	return "; but a seccomp filter, perhaps of a container, may forbid userfaultfd(2) in spite of all these"
}

func notThere(devErr error) string {
	if errors.Is(devErr, os.ErrNotExist) {
		return " (which is not there: Linux 6.1)"
	}
	return ""
}
