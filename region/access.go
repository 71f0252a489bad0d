//go:build linux

package region

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
)

// How ReadAt and WriteAt copy
//
// All goes through process_vm_writev(2) and process_vm_readv(2) on this process: a system call that meets a missing or protected page waits in the kernel,
// without a P. (Copying what is resident directly would be faster, but "resident" is no promise: the page may be evicted between the look and the copy,
// and then the copy stops the P.)
//
// These calls treat their two sides differently. The remote side is pinned page by page and then copied through the pin; the local side is accessed like the
// buffer of read(2), through the page table at the moment of the copy. A pin is invisible to the pager: a page that is evicted between pin and copy would
// lose a write, and show zeros to a read. So region memory is always the local side, whichever way the data goes: a read from the region is a
// process_vm_writev into the caller's buffer, a write to it a process_vm_readv from the buffer.

// chunk is how many bytes one system call copies at most: Close and a fault are noticed in between.
const chunk = 1 << 20

// retries is how often an access is tried again that failed on a page which has no error.
const retries = 3

var (
	errReadOnly = fmt.Errorf("the region is mapped read-only: %w", emm.ProtectionFailure)
	self        = os.Getpid()
)

var (
	_ io.ReaderAt = (*Region)(nil)
	_ io.WriterAt = (*Region)(nil)
)

// ReadAt copies from the region into p, as io.ReaderAt: fewer bytes than len(p) come with io.EOF at the end of the region. Missing pages are waited for in a
// system call, which holds no P. A page that cannot be had ends it with a *FaultError at its offset, after the bytes before it.
func (r *Region) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.at("read region", p, off, false)
	if err == nil && (n < len(p) || off >= r.size) {
		err = io.EOF
	}
	return n, err
}

// WriteAt copies p into the region, as io.WriterAt: what does not fit before its end is left, with io.ErrShortWrite. Otherwise it is like
// ReadAt. On a read-only region it fails with emm.ProtectionFailure.
func (r *Region) WriteAt(p []byte, off int64) (int, error) {
	if r.readOnly {
		return 0, fmt.Errorf("write region: %w", errReadOnly)
	}
	n, err := r.at("write region", p, off, true)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return n, err
}

// at copies what lies inside the region.
func (r *Region) at(what string, p []byte, off int64, write bool) (int, error) {
	if off < 0 {
		return 0, invalid("%s: offset %d", what, off)
	}
	if err := r.enter(); err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	defer r.leave()
	if r.pager.gone() {
		return 0, &FaultError{Region: r, Offset: off, Err: errGoneForever}
	}
	if off >= r.size || len(p) == 0 {
		return 0, nil
	}
	p = p[:min(int64(len(p)), r.size-off)]
	// A buffer that is itself region memory would be the pinned side: it goes through one that is not.
	var bounce []byte
	if mapped.overlaps(p) {
		bounce = make([]byte, min(len(p), chunk/4))
	}
	done := 0
	for done < len(p) {
		part := p[done:min(len(p), done+chunk)]
		n, err := 0, error(nil)
		if bounce == nil {
			n, err = r.copy(part, off+int64(done), write)
		} else {
			n, err = r.copyBounced(part[:min(len(part), len(bounce))], bounce, off+int64(done), write)
		}
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// copy copies between p and the region at off; both inside. It returns what was copied, and with less than len(p) why.
func (r *Region) copy(p []byte, off int64, write bool) (int, error) {
	if r.pager.options.UserModeOnly {
		return r.copyPlain(p, off, write)
	}
	done, tries := 0, 0
	for done < len(p) {
		n, err := transfer(r.mem[r.delta+off+int64(done):], p[done:], write)
		if n > 0 {
			done += n
			tries = 0
			continue
		}
		if r.closing.Load() {
			return done, fmt.Errorf("access region: %w", ErrClosed)
		}
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSYS): // a seccomp filter, as some containers have
			n, err := r.copyPlain(p[done:], off+int64(done), write)
			return done + n, err
		case err != nil && !errors.Is(err, unix.EFAULT):
			return done, fmt.Errorf("access region at offset %#x: %w", off+int64(done), err)
		}
		fe := r.fault(off + int64(done))
		if fe.Err == errNoFault {
			if tries++; tries < retries {
				continue
			}
			fe.Err = fmt.Errorf("the pager knows of no error there: is the buffer accessible?: %w: %w", emm.InvalidAddress, unix.EFAULT)
		}
		return done, fe
	}
	return done, nil
}

// transfer copies as much as one system call does between the region's memory (mem) and p.
func transfer(mem, p []byte, write bool) (int, error) {
	local, remote := iovec{unsafe.SliceData(mem), len(p)}, iovec{unsafe.SliceData(p), len(p)}
	if write {
		return unix.ProcessVMReadv(self, local.local(), remote.remote(), 0)
	}
	return unix.ProcessVMWritev(self, local.local(), remote.remote(), 0)
}

// iovec is struct iovec. For the remote side x/sys has the address as an integer, which would not follow a buffer on a stack that grows.
type iovec struct {
	base *byte
	len  int
}

func (v *iovec) local() []unix.Iovec { return unsafe.Slice((*unix.Iovec)(unsafe.Pointer(v)), 1) }

func (v *iovec) remote() []unix.RemoteIovec {
	return unsafe.Slice((*unix.RemoteIovec)(unsafe.Pointer(v)), 1)
}

// copyBounced is copy for a p that is region memory too.
func (r *Region) copyBounced(p, bounce []byte, off int64, write bool) (int, error) {
	bounce = bounce[:len(p)]
	if !write {
		n, err := r.copy(bounce, off, false)
		m, merr := buffered(p[:n], bounce[:n], true)
		if m < n {
			return m, merr
		}
		return n, err
	}
	n, err := buffered(p, bounce, false)
	m, merr := r.copy(bounce[:n], off, true)
	if m < n {
		return m, merr
	}
	return n, err
}

// buffered copies between user memory that belongs to some region (mem) and buf, which does not.
func buffered(mem, buf []byte, write bool) (int, error) {
	done := 0
	for done < len(mem) {
		n, err := transfer(mem[done:], buf[done:], write)
		if n <= 0 && !errors.Is(err, unix.EINTR) {
			return done, fmt.Errorf("access buffer, which is region memory too: %w", mapped.reason(&mem[done], err))
		}
		done += max(n, 0)
	}
	return done, nil
}

// copyPlain touches the memory, for tasks whose system calls cannot wait for missing pages (tier C). Populating first keeps most waits off the P.
func (r *Region) copyPlain(p []byte, off int64, write bool) (int, error) {
	done := 0
	for done < len(p) {
		n := min(len(p)-done, int(r.pageSize-(r.delta+off+int64(done))&(r.pageSize-1)))
		at := off + int64(done)
		r.Populate(r.ctx, at, int64(n), write) // its error is the touch's
		err := Guard(func() error {
			mem := r.mem[r.delta+at : r.delta+at+int64(n)]
			if write {
				copy(mem, p[done:done+n])
			} else {
				copy(p[done:done+n], mem)
			}
			return nil
		})
		if fe := (*FaultError)(nil); errors.As(err, &fe) {
			fe.Offset = at // copy may have begun anywhere in the page; nothing of it counts
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// errNoFault says that the pager has no error for a page.
var errNoFault = fmt.Errorf("the page has no error any more: try again: %w", emm.MemoryError)

// errGoneForever is the reason of faults when the pager is gone.
var errGoneForever = fmt.Errorf("%w: %w", ErrPagerGone, emm.MemoryFailure)

// fault finds out why the byte at off cannot be had, and arms the page again: the marker that made the access fail is sticky, and only this process
// can drop it. The caller has entered the region. The Err is errNoFault if the pager knows of none.
func (r *Region) fault(off int64) *FaultError {
	fe := &FaultError{Region: r, Offset: off}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	m, err := r.call(ctx, "ask the pager for the reason", ipc.TypeFaultReason, ipc.FaultReason{Mapping: r.id, Offset: r.delta + off})
	switch {
	case errors.Is(err, ErrClosed):
		fe.Err = ErrClosed
		return fe
	case errors.Is(err, ErrPagerGone):
		fe.Err = errGoneForever // and the marker stays: nobody would answer the next touch
		return fe
	case err != nil:
		fe.Err = fmt.Errorf("%w: %w", emm.MemoryError, err)
		return fe
	}
	defer m.Close()
	reason, text, err := ipc.Decode[ipc.FaultReasonReply](m.Body)
	if err != nil {
		fe.Err = fmt.Errorf("%w: %w", emm.MemoryError, err)
		return fe
	}
	fe.Err = reasonError(reason, string(text))
	// On shared memory this drops entries of the page table, never contents: what was resident comes back as a minor fault.
	page := (r.delta + off) &^ (r.pageSize - 1)
	if err := unix.Madvise(r.mem[page:page+r.pageSize], unix.MADV_DONTNEED); err != nil {
		fe.Err = fmt.Errorf("%w (and the page stays unusable: MADV_DONTNEED: %w)", fe.Err, err)
	}
	return fe
}

// reasonError makes an error of a FaultReasonReply.
func reasonError(r ipc.FaultReasonReply, text string) error {
	k := emm.KernReturn(r.Reason)
	if k == emm.Success {
		return errNoFault
	}
	err := error(k)
	if r.Errno != 0 {
		err = fmt.Errorf("%w: %w", k, unix.Errno(r.Errno))
	}
	if text != "" && text != err.Error() {
		err = fmt.Errorf("%s: %w", text, err)
	}
	return err
}
