package frames

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// File is the frames of one memory object: an unlinked file. Its methods may be called from any goroutine.
type File struct {
	pool *Pool        // immutable
	size atomic.Int64 // bytes, whole pages
	mu   sync.RWMutex // shared by users of fd, exclusively by Close
	fd   int          // guarded by mu; -1 when closed. Its number alone is told by Fd without it.

	released func() // guarded by mu; called when the descriptor is closed for good; may be nil
}

// NewFile makes an empty file of size bytes, rounded up to whole pages. It occupies no frames.
func (p *Pool) NewFile(size int64) (*File, error) {
	if size < 0 {
		return nil, fmt.Errorf("create frame file of %d bytes: %w", size, unix.EINVAL)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, fmt.Errorf("create frame file: %w", os.ErrClosed)
	}
	f := &File{pool: p}
	var err error
	if p.mount != nil {
		f.fd, err = p.mount.tmpfile()
	} else {
		f.fd, err = memfd()
	}
	if err != nil {
		return nil, fmt.Errorf("create frame file: %w", err)
	}
	if err := f.Truncate(size); err != nil {
		unix.Close(f.fd)
		return nil, err
	}
	p.files[f] = struct{}{}
	return f, nil
}

// memfd makes a file that only its owner can open again for writing, and whose holders can neither seal nor execute it.
func memfd() (int, error) {
	fd, err := unix.MemfdCreate("machpager", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if err != nil {
		return -1, fmt.Errorf("memfd_create: %w", err)
	}
	if err := unix.Fchmod(fd, 0o600); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("change mode of memfd: %w", err)
	}
	defer unix.Close(fd)
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL); err != nil {
		return -1, fmt.Errorf("seal memfd: %w", err)
	}
	// The kernel does not count the description that memfd_create makes among the file's writers, and would grant no lease for it: see shared.
	n, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDWR|unix.O_CLOEXEC|unix.O_LARGEFILE, 0)
	if err != nil {
		return -1, fmt.Errorf("reopen memfd: %w (/proc must be mounted)", err)
	}
	return n, nil
}

// use keeps the fd open until done.
func (f *File) use(what string) (int, error) {
	f.mu.RLock()
	if f.fd < 0 {
		f.mu.RUnlock()
		return -1, fmt.Errorf("%s frame file: %w", what, os.ErrClosed)
	}
	return f.fd, nil
}

func (f *File) done() { f.mu.RUnlock() }

// Fd is the number of the descriptor, -1 when closed. It is good until Close, and Close does not wait for who uses it by number.
func (f *File) Fd() int {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.fd
}

// OnRelease has fn called, once, when nobody has the file any more as far as is known and its descriptor is closed: in Close, or in a later Reap if a task has the file
// open. Whoever keeps a copy of the descriptor for the pager after this one gives it up then, and no sooner: a file that is open somewhere can be filled by who
// has it, and emptied only by who has it too. fn is called from any goroutine, without a lock.
func (f *File) OnRelease(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.released = fn
}

// Size is the file's size in bytes, as NewFile or Truncate set it.
func (f *File) Size() int64 { return f.size.Load() }

// ReadAt fills b from the file at off (pread). Pages that are not present read as zeros and stay absent; so does what a task has cut off: the file is
// made as long again, or nobody could ever let go of pages that were there. Behind Size is io.ErrUnexpectedEOF.
func (f *File) ReadAt(b []byte, off int64) error {
	fd, err := f.use("read")
	if err != nil {
		return err
	}
	defer f.done()
	for len(b) > 0 {
		n, err := unix.Pread(fd, b, off)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("read frame file at %d, %d bytes: %w", off, len(b), err)
		case n == 0 && off < f.size.Load():
			if err := unix.Ftruncate(fd, f.size.Load()); err != nil {
				return fmt.Errorf("read frame file at %d, %d bytes: make it as long again: %w", off, len(b), err)
			}
			continue
		case n == 0:
			return fmt.Errorf("read frame file at %d, %d bytes: %w", off, len(b), io.ErrUnexpectedEOF)
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// WriteAt writes b at off (pwrite) and says how many bytes it wrote, also beside an error. ENOSPC or ENOMEM: no frame was to be had behind them. The
// file is not made longer: what does not fit in Size is EINVAL. See the package comment for what a write costs in frames.
func (f *File) WriteAt(b []byte, off int64) (int, error) {
	fd, err := f.use("write")
	if err != nil {
		return 0, err
	}
	defer f.done()
	if size := f.size.Load(); off < 0 || off > size-int64(len(b)) {
		return 0, fmt.Errorf("write frame file at %d, %d bytes: %w (its size is %d)", off, len(b), unix.EINVAL, size)
	}
	for done := 0; ; {
		if done == len(b) {
			return done, nil
		}
		n, err := unix.Pwrite(fd, b[done:], off+int64(done))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return done, fmt.Errorf("write frame file at %d, %d bytes: %w", off+int64(done), len(b)-done, err)
		case n == 0:
			return done, fmt.Errorf("write frame file at %d, %d bytes: %w", off+int64(done), len(b)-done, io.ErrShortWrite)
		}
		done += n
	}
}

// Blocks is how many bytes of frames the kernel charges to the file.
func (f *File) Blocks() (int64, error) {
	fd, err := f.use("stat")
	if err != nil {
		return 0, err
	}
	defer f.done()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("stat frame file: %w", err)
	}
	return st.Blocks * 512, nil
}

// Truncate sets the size, in bytes, rounded up to whole pages. Pages behind it are gone; a task that touches them gets SIGBUS.
func (f *File) Truncate(size int64) error {
	if size < 0 {
		return fmt.Errorf("truncate frame file to %d bytes: %w", size, unix.EINVAL)
	}
	fd, err := f.use("truncate")
	if err != nil {
		return err
	}
	defer f.done()
	size = (size + PageSize - 1) &^ (PageSize - 1)
	if err := unix.Ftruncate(fd, size); err != nil {
		return fmt.Errorf("truncate frame file to %d bytes: %w", size, err)
	}
	f.size.Store(size)
	return nil
}

// Dup is the file for a task that may write it. It is opened anew and not duplicated: a task that sets O_APPEND on a description it shared with
// the pager would move the pager's own writes to the end of the file.
func (f *File) Dup() (*os.File, error) { return f.reopen(unix.O_RDWR, "read-write") }

// ReadOnly is the file for a task that may only read it. The mode, 0600, keeps other users from making it writable again; processes of the
// pager's own user cannot be kept from anything.
func (f *File) ReadOnly() (*os.File, error) { return f.reopen(unix.O_RDONLY, "read-only") }

func (f *File) reopen(flags int, how string) (*os.File, error) {
	fd, err := f.use("reopen")
	if err != nil {
		return nil, err
	}
	defer f.done()
	for {
		n, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), flags|unix.O_CLOEXEC|unix.O_LARGEFILE, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reopen frame file %s: %w (/proc must be mounted)", how, err)
		}
		return os.NewFile(uintptr(n), "frames"), nil
	}
}

// Close waits for methods that use the file, empties it, and closes it, or leaves it to the pool if somebody else has it open: see Pool.Reap. Idempotent.
func (f *File) Close() error {
	f.pool.mu.Lock()
	delete(f.pool.files, f)
	f.pool.mu.Unlock()
	f.mu.Lock()
	fd, released := f.fd, f.released
	f.fd = -1
	f.mu.Unlock()
	if fd < 0 {
		return nil
	}
	return f.pool.bury(fd, released)
}
