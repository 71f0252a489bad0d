//go:build linux && !(mips || mipsle || mips64 || mips64le || ppc64 || ppc64le)

package uffd

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file is <linux/userfaultfd.h>, and PAGEMAP_SCAN of <linux/fs.h>: every raw number, every struct the kernel reads or writes, and all
// unsafe code of the package. The architectures excluded above encode the direction of an ioctl differently.

const (
	apiVersion   = 0xaa // UFFD_API
	userModeOnly = 1    // UFFD_USER_MODE_ONLY
)

// _IOC of <asm-generic/ioctl.h>.
const (
	iocWrite = 1
	iocRead  = 2

	iocTypeUffd = 0xaa // UFFDIO, USERFAULTFD_IOC
	iocTypeFS   = 'f'
)

const (
	userfaultfdIocNew = iocTypeUffd << 8

	uffdioAPI          = (iocRead|iocWrite)<<30 | unsafe.Sizeof(apiArg{})<<16 | iocTypeUffd<<8 | nrAPI
	uffdioRegister     = (iocRead|iocWrite)<<30 | unsafe.Sizeof(registerArg{})<<16 | iocTypeUffd<<8 | nrRegister
	uffdioUnregister   = iocRead<<30 | unsafe.Sizeof(rangeArg{})<<16 | iocTypeUffd<<8 | nrUnregister
	uffdioWake         = iocRead<<30 | unsafe.Sizeof(rangeArg{})<<16 | iocTypeUffd<<8 | nrWake
	uffdioCopy         = (iocRead|iocWrite)<<30 | unsafe.Sizeof(copyArg{})<<16 | iocTypeUffd<<8 | nrCopy
	uffdioZeropage     = (iocRead|iocWrite)<<30 | unsafe.Sizeof(fillArg{})<<16 | iocTypeUffd<<8 | nrZeropage
	uffdioMove         = (iocRead|iocWrite)<<30 | unsafe.Sizeof(copyArg{})<<16 | iocTypeUffd<<8 | nrMove
	uffdioWriteProtect = (iocRead|iocWrite)<<30 | unsafe.Sizeof(writeProtectArg{})<<16 | iocTypeUffd<<8 | nrWriteProtect
	uffdioContinue     = (iocRead|iocWrite)<<30 | unsafe.Sizeof(fillArg{})<<16 | iocTypeUffd<<8 | nrContinue
	uffdioPoison       = (iocRead|iocWrite)<<30 | unsafe.Sizeof(fillArg{})<<16 | iocTypeUffd<<8 | nrPoison

	pagemapScan = (iocRead|iocWrite)<<30 | unsafe.Sizeof(scanArg{})<<16 | iocTypeFS<<8 | 16
)

// Numbers of the ioctls: _UFFDIO_*. They are also the bits of Ioctls.
const (
	nrRegister     = 0x00
	nrUnregister   = 0x01
	nrWake         = 0x02
	nrCopy         = 0x03
	nrZeropage     = 0x04
	nrMove         = 0x05
	nrWriteProtect = 0x06
	nrContinue     = 0x07
	nrPoison       = 0x08
	nrAPI          = 0x3f
)

// Features is a set of UFFD_FEATURE_* bits: what a userfaultfd may be asked to do when it is opened.
type Features uint64

// The features, with the kernel that brought each (see Have).
const (
	FeatureWriteProtect      Features = 1 << 0  // WP faults on anonymous memory (PAGEFAULT_FLAG_WP); 5.7
	FeatureEventFork         Features = 1 << 1  // EventFork; needs CAP_SYS_PTRACE; 4.11
	FeatureEventRemap        Features = 1 << 2  // EventRemap; without it mremap(2) leaves the new range unregistered; 4.11
	FeatureEventRemove       Features = 1 << 3  // EventRemove; 4.11
	FeatureMissingHugetlb    Features = 1 << 4  // RegisterMissing on hugetlb; 4.11
	FeatureMissingShmem      Features = 1 << 5  // RegisterMissing on shared memory, tmpfs, memfd; 4.11
	FeatureEventUnmap        Features = 1 << 6  // EventUnmap; 4.11
	FeatureSigbus            Features = 1 << 7  // SIGBUS to the faulting thread in place of a message; 4.14
	FeatureThreadID          Features = 1 << 8  // Msg.ThreadID; 4.14
	FeatureMinorHugetlb      Features = 1 << 9  // RegisterMinor on hugetlb; 5.13
	FeatureMinorShmem        Features = 1 << 10 // RegisterMinor on shared memory; 5.14
	FeatureExactAddress      Features = 1 << 11 // Msg.Address is the byte touched, not its page; 5.18
	FeatureWriteProtectShmem Features = 1 << 12 // RegisterWP on shared memory and hugetlb; 5.19
	FeatureWPUnpopulated     Features = 1 << 13 // WriteProtect reaches absent pages of anonymous memory too; 6.4
	FeaturePoison            Features = 1 << 14 // Poison; 6.6
	FeatureWPAsync           Features = 1 << 15 // the kernel resolves WP faults by itself; PagemapScan tells who wrote; 6.7
	FeatureMove              Features = 1 << 16 // Move; 6.8
)

// Ioctls is a set of ioctls, as Register and the handshake report them.
type Ioctls uint64

const (
	IoctlRegister     Ioctls = 1 << nrRegister
	IoctlUnregister   Ioctls = 1 << nrUnregister
	IoctlWake         Ioctls = 1 << nrWake
	IoctlCopy         Ioctls = 1 << nrCopy
	IoctlZeropage     Ioctls = 1 << nrZeropage
	IoctlMove         Ioctls = 1 << nrMove
	IoctlWriteProtect Ioctls = 1 << nrWriteProtect
	IoctlContinue     Ioctls = 1 << nrContinue
	IoctlPoison       Ioctls = 1 << nrPoison
	IoctlAPI          Ioctls = 1 << nrAPI
)

// RegisterMode says which faults of a range become messages.
type RegisterMode uint64

const (
	RegisterMissing RegisterMode = 1 << 0 // no page there
	RegisterWP      RegisterMode = 1 << 1 // a write to a page that WriteProtect or a WP mode protected
	RegisterMinor   RegisterMode = 1 << 2 // the page is in the file, but not mapped yet (shared memory and hugetlb)
)

// CopyMode modifies Copy.
type CopyMode uint64

const (
	CopyDontWake CopyMode = 1 << 0 // do not wake the threads that wait
	CopyWP       CopyMode = 1 << 1 // map the pages write-protected; the range must be registered with RegisterWP
)

// ZeropageMode modifies Zeropage.
type ZeropageMode uint64

const ZeropageDontWake ZeropageMode = 1 << 0 // do not wake the threads that wait

// ContinueMode modifies Continue.
type ContinueMode uint64

const (
	ContinueDontWake ContinueMode = 1 << 0 // do not wake the threads that wait
	ContinueWP       ContinueMode = 1 << 1 // map the pages write-protected; 6.4
)

// WriteProtectMode modifies WriteProtect; 0 takes protection away.
type WriteProtectMode uint64

const (
	WriteProtectWP       WriteProtectMode = 1 << 0 // protect
	WriteProtectDontWake WriteProtectMode = 1 << 1 // do not wake the threads that wait; only without WriteProtectWP
)

// PoisonMode modifies Poison.
type PoisonMode uint64

const PoisonDontWake PoisonMode = 1 << 0 // do not wake the threads that wait

// MoveMode modifies Move.
type MoveMode uint64

const (
	MoveDontWake      MoveMode = 1 << 0 // do not wake the threads that wait
	MoveAllowSrcHoles MoveMode = 1 << 1 // pass over absent source pages; else ENOENT
)

// Event is the kind of a Msg.
type Event uint8

const (
	EventPagefault Event = 0x12
	EventFork      Event = 0x13
	EventRemap     Event = 0x14
	EventRemove    Event = 0x15
	EventUnmap     Event = 0x16
)

// FaultFlags tells what kind of page fault a message is about. Neither FaultWP nor FaultMinor: a missing page.
type FaultFlags uint64

const (
	FaultWrite FaultFlags = 1 << 0 // a write; set for FaultWP too
	FaultWP    FaultFlags = 1 << 1 // a write to a protected page
	FaultMinor FaultFlags = 1 << 2 // the page is in the file
)

// PageCategory is a set of PAGE_IS_* bits: what PagemapScan knows about a page.
type PageCategory uint64

const (
	PageWPAllowed PageCategory = 1 << 0 // asynchronously write-protectable (FeatureWPAsync)
	PageWritten   PageCategory = 1 << 1 // written since it was protected
	PageFile      PageCategory = 1 << 2 // belongs to a file, or is shared
	PagePresent   PageCategory = 1 << 3
	PageSwapped   PageCategory = 1 << 4
	PageZeroPFN   PageCategory = 1 << 5 // the shared page of zeros
	PageHuge      PageCategory = 1 << 6 // mapped by a huge page table entry
	PageSoftDirty PageCategory = 1 << 7 // 6.7 with CONFIG_MEM_SOFT_DIRTY
	PageGuard     PageCategory = 1 << 8 // a guard page (madvise(2), MADV_GUARD_INSTALL); 6.15
)

// ScanFlags modifies PagemapScan.
type ScanFlags uint64

const (
	ScanWPMatching   ScanFlags = 1 << 0 // write-protect the pages that match, in the same step
	ScanCheckWPAsync ScanFlags = 1 << 1 // fail with EPERM on memory that is not registered for RegisterWP with FeatureWPAsync
)

// Structs of the ioctls. The kernel does not read the last field of those with a result; it writes it, except on some early failures.
type (
	apiArg      struct{ api, features, ioctls uint64 } // struct uffdio_api
	rangeArg    struct{ start, length uint64 }         // struct uffdio_range
	registerArg struct {                               // struct uffdio_register
		rangeArg
		mode, ioctls uint64
	}
	writeProtectArg struct { // struct uffdio_writeprotect
		rangeArg
		mode uint64
	}
	copyArg struct { // struct uffdio_copy, uffdio_move
		dst, src, length, mode uint64
		done                   int64
	}
	fillArg struct { // struct uffdio_zeropage, uffdio_continue, uffdio_poison
		rangeArg
		mode uint64
		done int64
	}
	scanArg struct { // struct pm_scan_arg
		size, flags, start, end, walkEnd, vec, vecLen, maxPages uint64
		inverted, mask, anyOf, returned                         PageCategory
	}
)

// Msg is one message of a userfaultfd: struct uffd_msg, 32 bytes exactly as the kernel writes it.
type Msg struct {
	event Event
	_     [7]byte
	arg   [3]uint64
}

const sizeofMsg = unsafe.Sizeof(Msg{})

// arg32 returns the 32-bit field that begins where arg[i] begins.
func (m *Msg) arg32(i int) uint32 { return *(*uint32)(unsafe.Pointer(&m.arg[i])) }

// ioctl is the system call, made so that the scheduler can take the P away while it lasts.
// arg may point to the stack: the kernel has it only while the goroutine is in the call, and there its stack stays where it is.
func ioctl(fd int, request uintptr, arg unsafe.Pointer) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	return errno
}

func ioctlNew(device int, flags uintptr) (int, unix.Errno) {
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(device), userfaultfdIocNew, flags)
	return int(fd), errno
}

func userfaultfd(flags uintptr) (int, unix.Errno) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
	return int(fd), errno
}

func ioctlAPI(fd int, version uint64, f Features) (Features, Ioctls, unix.Errno) {
	a := apiArg{api: version, features: uint64(f)}
	errno := ioctl(fd, uffdioAPI, unsafe.Pointer(&a))
	return Features(a.features), Ioctls(a.ioctls), errno
}

func ioctlRegister(fd int, start, length uint64, mode RegisterMode) (Ioctls, unix.Errno) {
	a := registerArg{rangeArg: rangeArg{start, length}, mode: uint64(mode)}
	errno := ioctl(fd, uffdioRegister, unsafe.Pointer(&a))
	return Ioctls(a.ioctls), errno
}

func ioctlUnregister(fd int, start, length uint64) unix.Errno {
	a := rangeArg{start, length}
	return ioctl(fd, uffdioUnregister, unsafe.Pointer(&a))
}

func ioctlWake(fd int, start, length uint64) unix.Errno {
	a := rangeArg{start, length}
	return ioctl(fd, uffdioWake, unsafe.Pointer(&a))
}

func ioctlWriteProtect(fd int, start, length uint64, mode WriteProtectMode) unix.Errno {
	a := writeProtectArg{rangeArg{start, length}, uint64(mode)}
	return ioctl(fd, uffdioWriteProtect, unsafe.Pointer(&a))
}

// ioctlCopy takes the source as a uintptr that the kernel finds inside a struct, where neither the collector nor a growing stack would see it.
// The directive makes the caller's memory escape to the heap, where it does not move, and keeps it alive until ioctlCopy returns.
//
//go:uintptrescapes
func ioctlCopy(fd int, dst uint64, src uintptr, length uint64, mode CopyMode) (int64, unix.Errno) {
	a := copyArg{dst: dst, src: uint64(src), length: length, mode: uint64(mode)}
	errno := ioctl(fd, uffdioCopy, unsafe.Pointer(&a))
	return a.done, errno
}

func copyPages(fd int, dst uint64, src []byte, mode CopyMode) (int64, unix.Errno) {
	return ioctlCopy(fd, dst, uintptr(unsafe.Pointer(unsafe.SliceData(src))), uint64(len(src)), mode)
}

func ioctlMove(fd int, dst, src, length uint64, mode MoveMode) (int64, unix.Errno) {
	a := copyArg{dst: dst, src: src, length: length, mode: uint64(mode)}
	errno := ioctl(fd, uffdioMove, unsafe.Pointer(&a))
	return a.done, errno
}

// ioctlFill is Zeropage, Continue or Poison, which look alike.
func ioctlFill(fd int, request uintptr, start, length, mode uint64) (int64, unix.Errno) {
	a := fillArg{rangeArg: rangeArg{start, length}, mode: mode}
	errno := ioctl(fd, request, unsafe.Pointer(&a))
	return a.done, errno
}

// readNow is readMsgs that never waits: O_NONBLOCK belongs to everybody who has the userfaultfd, and another process can take it away between any two
// system calls of ours. It fails with EOPNOTSUPP where the kernel cannot do that (before 6.10).
func readNow(fd int, msgs []Msg) (int, unix.Errno) {
	iov := unix.Iovec{Base: (*byte)(unsafe.Pointer(unsafe.SliceData(msgs))), Len: uint64(len(msgs)) * uint64(sizeofMsg)}
	// Position -1: none. See preadv2(2).
	n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, ^uintptr(0), ^uintptr(0), unix.RWF_NOWAIT)
	return int(n / sizeofMsg), errno
}

func readMsgs(fd int, msgs []Msg) (int, unix.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs))*sizeofMsg)
	return int(n / sizeofMsg), errno
}

// ioctlPagemapScan returns the regions written and the address where the walk ended. For vec, see ioctlCopy.
//
//go:uintptrescapes
func ioctlPagemapScan(fd int, vec, vecLen uintptr, a *scanArg) (int, unix.Errno) {
	a.size, a.vec, a.vecLen = uint64(unsafe.Sizeof(*a)), uint64(vec), uint64(vecLen)
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), pagemapScan, uintptr(unsafe.Pointer(a)))
	return int(n), errno
}

func scanPages(fd int, regions []PageRegion, a *scanArg) (int, unix.Errno) {
	if len(regions) == 0 {
		return ioctlPagemapScan(fd, 0, 0, a) // the kernel wants both or none
	}
	return ioctlPagemapScan(fd, uintptr(unsafe.Pointer(unsafe.SliceData(regions))), uintptr(len(regions)), a)
}

// address returns where mapped memory lies; for memory of the Go heap it would not be stable.
func address(mem []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))) }
