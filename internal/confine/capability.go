package confine

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Capability is one of capabilities(7).
type Capability uint

// Those that this program speaks of.
const (
	SysAdmin  Capability = unix.CAP_SYS_ADMIN
	SysPtrace Capability = unix.CAP_SYS_PTRACE
)

func (c Capability) String() string {
	switch c {
	case SysAdmin:
		return "CAP_SYS_ADMIN"
	case SysPtrace:
		return "CAP_SYS_PTRACE"
	}
	return fmt.Sprintf("capability %d", uint(c))
}

// sets are the two words of capset(2).
type sets [2]unix.CapUserData

// Capabilities gives up every capability but those of keep, as far as this process has them, on all its threads, and the right to gain any by executing a
// file (no_new_privs, see prctl(2)). What was given up cannot be had back. errors.ErrUnsupported: linked with cgo; no_new_privs is set then all the same, on the
// calling thread, which is what a child inherits.
func Capabilities(keep ...Capability) error {
	nnpErr := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0)
	if errors.Is(nnpErr, errors.ErrUnsupported) {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("set no_new_privs: %w", err)
		}
		return fmt.Errorf("give up capabilities: %w", nnpErr)
	}
	if nnpErr != nil {
		return fmt.Errorf("set no_new_privs: %w", nnpErr)
	}
	have, err := capget()
	if err != nil {
		return err
	}
	var want sets
	for _, c := range keep {
		bit := uint32(1) << (c % 32)
		want[c/32].Permitted |= have[c/32].Permitted & bit
		want[c/32].Effective |= have[c/32].Effective & bit
	}
	h := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // pid 0: the thread that calls
	if err := allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(h)), uintptr(unsafe.Pointer(&want)), 0); err != nil {
		return fmt.Errorf("give up capabilities: %w", err)
	}
	return nil
}

// Held lists the capabilities that the calling thread has in effect, for people: "none", or their names.
func Held() string {
	have, err := capget()
	if err != nil {
		return err.Error()
	}
	var names []string
	for c := range Capability(unix.CAP_LAST_CAP + 1) {
		if have[c/32].Effective&(1<<(c%32)) != 0 {
			names = append(names, c.String())
		}
	}
	switch {
	case len(names) == 0:
		return "none"
	case len(names) > 4:
		return fmt.Sprintf("%d of %d", len(names), unix.CAP_LAST_CAP+1)
	}
	return strings.Join(names, ", ")
}

func capget() (s sets, err error) {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&h, &s[0]); err != nil {
		return s, fmt.Errorf("read capabilities: %w", err)
	}
	return s, nil
}

// allThreads makes a system call on every thread of this process. The runtime panics if threads differ in what comes of it.
//
//go:uintptrescapes
func allThreads(call, a, b, c uintptr) error {
	_, _, errno := syscall.AllThreadsSyscall6(call, a, b, c, 0, 0, 0)
	if errno == syscall.ENOTSUP && linkedWithCgo {
		return fmt.Errorf("this program is linked with cgo, whose threads the Go runtime cannot reach: %w", errors.ErrUnsupported)
	}
	if errno != 0 {
		return errno
	}
	return nil
}
