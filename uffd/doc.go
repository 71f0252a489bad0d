// Package uffd is Linux userfaultfd(2): complete and thin, in pure Go.
//
// A userfaultfd hands the page faults of registered memory to user space. Open makes one for the calling process, FromFd adopts one received
// from another process; Read takes its messages, and Copy, Zeropage, Continue, Move, Poison and WriteProtect answer them. Every ioctl is one
// method, one system call, no loop and no policy: what the kernel says is what the caller gets.
//
// # Addresses
//
// Addresses and lengths are bytes in the address space of the process that opened the userfaultfd, hence uint64 and not pointers: the memory
// need not exist in the calling process. Ranges are whole pages of the memory they name (huge pages for hugetlb).
//
// # Errors
//
// Every method of FD that fails returns an *Error, which unwraps to the unix.Errno; test with errors.Is. Calls on a closed FD match os.ErrClosed.
// What the errnos of an ioctl that resolves faults mean:
//
//	EEXIST  a page is there already (Copy, Zeropage, Move), mapped already (Continue). No thread was woken: call Wake.
//	EAGAIN  an event (fork, remap, remove, unmap) waits to be read, or the ioctl did a part: read events, then go on after the bytes done.
//	ENOENT  the range is not inside one mapping registered with this userfaultfd (WriteProtect: what lay before the foreign mapping is done).
//	EFAULT  Continue: the file has no page there. Copy: the source cannot be read.
//	ESRCH   the process is gone.
//	ENOSPC, ENOMEM  no memory, or the tmpfs or the hugetlb pool is full.
//	EINVAL  a range or a mode that this memory or this kernel does not know.
//
// Ioctls that can do a part of their range return the bytes done from its start, also beside an error.
//
// Have tells whether this kernel has a feature: nil, an error that is ErrNotSupported and names the feature and the oldest kernel with it, or
// an error that says the probe failed.
//
// # The rule for Go programs
//
// A Go thread stopped in a page fault keeps its P and may not be preemptible. The process whose memory is registered must not be the one that
// answers its faults, unless every touch that can fault is made inside a system call.
//
// # Concurrency
//
// All methods of FD may be called at the same time. Close waits for calls under way before it closes the descriptor, so that none can
// hit a recycled number. There are no locks.
package uffd
