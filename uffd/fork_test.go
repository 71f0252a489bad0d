//go:build linux

package uffd

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// forkChild must do nothing in the child that needs the Go runtime: one thread is left of it, and no scheduler. Hence raw system calls, no
// stack growth, nothing allocated.
//
//go:norace
//go:noinline
//go:nosplit
func forkChild(goOn, results int, addr uint64, b *[8]byte) (int, unix.Errno) {
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		return int(pid), errno
	}
	unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
	unix.RawSyscall(unix.SYS_READ, uintptr(goOn), uintptr(unsafe.Pointer(b)), 1)
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(results), uintptr(addr), uintptr(len(b)))
	status := uintptr(0)
	if n != uintptr(len(b)) {
		status = uintptr(errno)
	}
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, status, 0, 0)
	}
}
