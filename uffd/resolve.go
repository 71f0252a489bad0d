//go:build linux

package uffd

import "golang.org/x/sys/unix"

// fail makes the error of a call that did not succeed. Kept out of line so that success allocates nothing.
//
//go:noinline
func fail(op string, start, length uint64, errno unix.Errno) error {
	return &Error{Op: op, Start: start, Len: length, Errno: errno}
}

// partial interprets an ioctl with a result field, which is the bytes done or a negative errno. The field goes first: together with
// EAGAIN it tells whether a part was done. It stays 0 where the kernel failed before it got that far.
func partial(op string, start, length uint64, done int64, errno unix.Errno) (int64, error) {
	if errno == 0 {
		return done, nil
	}
	return max(done, 0), fail(op, start, length, errno)
}

// Register asks for the faults of a range of the process that opened the userfaultfd. The mappings in it must be anonymous, shared
// memory or hugetlb, and not belong to another userfaultfd. It returns the ioctls that may be used on the whole range.
// Registering again changes the mode. UFFDIO_REGISTER.
func (u *FD) Register(start, length uint64, mode RegisterMode) (Ioctls, error) {
	if !u.acquire() {
		return 0, fail("register", start, length, unix.EBADF)
	}
	defer u.done()
	ioctls, errno := ioctlRegister(u.fd, start, length, mode)
	if errno != 0 {
		return 0, fail("register", start, length, errno)
	}
	return ioctls, nil
}

// Unregister ends what Register began, takes protection away and wakes the threads that wait; absent pages read as zeros from then on.
// UFFDIO_UNREGISTER.
func (u *FD) Unregister(start, length uint64) error {
	if !u.acquire() {
		return fail("unregister", start, length, unix.EBADF)
	}
	defer u.done()
	if errno := ioctlUnregister(u.fd, start, length); errno != 0 {
		return fail("unregister", start, length, errno)
	}
	return nil
}

// Copy fills absent pages at dst with src, whose length is the length of the range, and wakes the threads that wait for them.
// src need not be aligned; it is read before Copy returns. It must not be memory whose fault the caller would have to answer.
// The pages appear atomically, whole and with their contents. It returns the bytes done, also with an error. UFFDIO_COPY.
func (u *FD) Copy(dst uint64, src []byte, mode CopyMode) (int64, error) {
	if !u.acquire() {
		return 0, fail("copy", dst, uint64(len(src)), unix.EBADF)
	}
	defer u.done()
	done, errno := copyPages(u.fd, dst, src, mode)
	return partial("copy", dst, uint64(len(src)), done, errno)
}

// Zeropage fills absent pages with zeros and wakes the threads that wait. Not for hugetlb (EINVAL). UFFDIO_ZEROPAGE.
func (u *FD) Zeropage(start, length uint64, mode ZeropageMode) (int64, error) {
	return u.fill("zeropage", uffdioZeropage, start, length, uint64(mode))
}

// Continue maps pages that are in the file already, and wakes the threads that wait. UFFDIO_CONTINUE.
func (u *FD) Continue(start, length uint64, mode ContinueMode) (int64, error) {
	return u.fill("continue", uffdioContinue, start, length, uint64(mode))
}

// Poison makes absent pages fail: SIGBUS for a touch, EFAULT for a system call. It wakes the threads that wait. The marker outlives the
// userfaultfd; it goes with the mapping, with madvise(MADV_DONTNEED), or with a Copy or Continue over it. UFFDIO_POISON, 6.6.
func (u *FD) Poison(start, length uint64, mode PoisonMode) (int64, error) {
	return u.fill("poison", uffdioPoison, start, length, uint64(mode))
}

func (u *FD) fill(op string, request uintptr, start, length, mode uint64) (int64, error) {
	if !u.acquire() {
		return 0, fail(op, start, length, unix.EBADF)
	}
	defer u.done()
	done, errno := ioctlFill(u.fd, request, start, length, mode)
	return partial(op, start, length, done, errno)
}

// Move fills absent pages at dst with the page frames at src, without copying; src is absent then. Both are private anonymous memory of
// the calling process, and src pages belong to it alone (EBUSY after fork). UFFDIO_MOVE, 6.8.
func (u *FD) Move(dst, src, length uint64, mode MoveMode) (int64, error) {
	if !u.acquire() {
		return 0, fail("move", dst, length, unix.EBADF)
	}
	defer u.done()
	done, errno := ioctlMove(u.fd, dst, src, length, mode)
	return partial("move", dst, length, done, errno)
}

// WriteProtect protects the present pages of a range against writes (WriteProtectWP), or with mode 0 takes the protection away and wakes
// the threads that wait. When it returns no thread can write a protected page. It does not stop at absent pages; on shared memory it
// leaves a marker there, on anonymous memory only with FeatureWPUnpopulated. Gaps between mappings are passed over, but a mapping that
// is not registered with RegisterWP ends it with ENOENT: what lies before is done, what lies behind is not. UFFDIO_WRITEPROTECT.
func (u *FD) WriteProtect(start, length uint64, mode WriteProtectMode) error {
	if !u.acquire() {
		return fail("write-protect", start, length, unix.EBADF)
	}
	defer u.done()
	if errno := ioctlWriteProtect(u.fd, start, length, mode); errno != 0 {
		return fail("write-protect", start, length, errno)
	}
	return nil
}

// Wake wakes the threads that wait in a range without resolving anything: they touch again, and each that still faults sends a new
// message. UFFDIO_WAKE.
func (u *FD) Wake(start, length uint64) error {
	if !u.acquire() {
		return fail("wake", start, length, unix.EBADF)
	}
	defer u.done()
	if errno := ioctlWake(u.fd, start, length); errno != 0 {
		return fail("wake", start, length, errno)
	}
	return nil
}
