package arena

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PageSize is the granularity of growth and of [Arena.Discard], in bytes. It does not depend on the machine.
const PageSize = 4096

// MaxSize bounds the data of one arena, in bytes: what fits in the address space beside everything else.
const MaxSize = 1 << 46

const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL

// Arena is memory in a memfd. Its methods may be called from any goroutine; what Bytes and Words return must not be used after Close.
type Arena struct {
	mem  []byte       // the whole mapping, header first; immutable until Close
	file *os.File     // immutable
	size atomic.Int64 // bytes of data committed, as the header says; 0 after Close
	mu   sync.RWMutex // held shared by users of the fd, exclusively by Grow and Close
	done bool         // guarded by mu
}

// Create makes an empty arena. The name is for people who read /proc/PID/fd. kind is 1 to 8 bytes and says, with version, what the data is.
// max is how far the data can grow, in bytes; it costs address space only.
func Create(name, kind string, version uint32, max int64) (*Arena, error) {
	h, err := newHeader(kind, version)
	if err != nil {
		return nil, fmt.Errorf("create arena %s: %w", name, err)
	}
	if max, err = roundMax(max); err != nil {
		return nil, fmt.Errorf("create arena %s: %w", name, err)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err != nil {
		return nil, fmt.Errorf("create arena %s: memfd_create: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), "arena:"+name)
	a, err := create(f, h, max)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("create arena %s: %w", name, err)
	}
	return a, nil
}

func create(f *os.File, h *header, max int64) (*Arena, error) {
	if err := f.Chmod(0o600); err != nil { // who is handed the fd read-only must not be able to reopen it
		return nil, fmt.Errorf("change mode of memfd: %w", err)
	}
	if err := f.Truncate(PageSize); err != nil {
		return nil, fmt.Errorf("extend memfd: %w", err)
	}
	if _, err := f.WriteAt(h.bytes(), 0); err != nil {
		return nil, fmt.Errorf("write header: %w", err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return nil, fmt.Errorf("seal memfd: %w", err)
	}
	return attach(f, 0, max)
}

// Open adopts an arena that another process made. The header must say the same kind and version; anything else, a file that could shrink, or
// more data than max bytes is an error that wraps [ErrFormat], [ErrVersion] or [ErrTooLarge]. On success the arena owns f; on error f is the
// caller's still.
func Open(f *os.File, kind string, version uint32, max int64) (*Arena, error) {
	max, err := roundMax(max)
	if err != nil {
		return nil, fmt.Errorf("open arena: %w", err)
	}
	size, err := verify(f, kind, version)
	if err != nil {
		return nil, fmt.Errorf("open arena: %w", err)
	}
	if size > max {
		return nil, fmt.Errorf("open arena: %w: %d bytes, at most %d expected", ErrTooLarge, size, max)
	}
	a, err := attach(f, size, max)
	if err != nil {
		return nil, fmt.Errorf("open arena: %w", err)
	}
	return a, nil
}

// attach maps header and max bytes of data.
func attach(f *os.File, size, max int64) (*Arena, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, int(PageSize+max), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes of address space: %w (a lower maximum, or ulimit -v)", PageSize+max, err)
	}
	a := &Arena{mem: mem, file: f}
	a.size.Store(size)
	return a, nil
}

func roundMax(max int64) (int64, error) {
	if max < 0 || max > MaxSize {
		return 0, fmt.Errorf("maximum of %d bytes: %w (0 to %d)", max, unix.EINVAL, int64(MaxSize))
	}
	return roundUp(max), nil
}

func roundUp(n int64) int64 { return (n + PageSize - 1) &^ (PageSize - 1) }

// committed is the header's size word: its store is what makes growth true.
func (a *Arena) committed() *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&a.mem[offCommitted]))
}

// File is the memfd, to be passed to the process that shall keep it. It stays the arena's: do not close it.
func (a *Arena) File() *os.File { return a.file }

// Size is how many bytes of data there are: len(Bytes()).
func (a *Arena) Size() int64 { return a.size.Load() }

// Bytes is the data as of the last Grow: a later Grow does not move it, it only makes the next Bytes longer. nil after Close.
func (a *Arena) Bytes() []byte {
	n := a.size.Load()
	if n == 0 {
		return nil
	}
	return unsafe.Slice(&a.mem[PageSize], n)
}

// Words is the same memory as 64-bit words, the unit of every commit.
func (a *Arena) Words() []atomic.Uint64 {
	n := a.size.Load()
	if n == 0 {
		return nil
	}
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&a.mem[PageSize])), n/8)
}

// Grow makes the data at least size bytes long, rounded up to whole pages; what is new is zeros. It never shrinks.
// More than the maximum wraps [ErrTooLarge].
func (a *Arena) Grow(size int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.done {
		return fmt.Errorf("grow arena: %w", os.ErrClosed)
	}
	if size <= a.size.Load() {
		return nil
	}
	// Compare before rounding: rounding up could overflow.
	if size > int64(len(a.mem))-PageSize {
		return fmt.Errorf("grow arena to %d bytes: %w (made for %d)", size, ErrTooLarge, len(a.mem)-PageSize)
	}
	size = roundUp(size)
	// A predecessor may have been killed between making the file longer and committing; the file cannot shrink.
	var st unix.Stat_t
	if err := unix.Fstat(int(a.file.Fd()), &st); err != nil {
		return fmt.Errorf("grow arena: fstat: %w", err)
	}
	if st.Size < PageSize+size {
		if err := a.file.Truncate(PageSize + size); err != nil {
			return fmt.Errorf("grow arena to %d bytes: %w", size, err)
		}
	}
	a.committed().Store(uint64(size))
	a.size.Store(size)
	return nil
}

// Discard gives back the memory of the whole pages inside [off, off+n); they read as zeros afterwards. Partial pages at either end keep
// their contents. Page by page it is atomic, as a whole it is not.
func (a *Arena) Discard(off, n int64) error {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.done {
		return fmt.Errorf("discard arena pages: %w", os.ErrClosed)
	}
	if off < 0 || n < 0 || off > a.size.Load()-n {
		return fmt.Errorf("discard arena pages at %d, %d bytes: %w (the arena has %d)", off, n, unix.EINVAL, a.size.Load())
	}
	first, end := roundUp(off), (off+n)&^(PageSize-1)
	if first >= end {
		return nil
	}
	for {
		err := unix.Fallocate(int(a.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, PageSize+first, end-first)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("discard arena pages at %d, %d bytes: %w", first, end-first, err)
		}
	}
}

// Data calls fn for every range of whole pages that may hold anything but zeros, in order, until it returns false: adopting a sparse table costs
// what was ever touched, not what it spans. It reports more than that where the kernel keeps larger pages, and never less.
func (a *Arena) Data(fn func(off, n int64) bool) {
	for off := int64(0); ; {
		start, end := a.NextData(off)
		if start >= end || !fn(start, end-start) {
			return
		}
		off = end
	}
}

// NextData is the first range at or behind off, in whole pages, that may hold anything but zeros; start == end: there is none. It holds the lock for its
// system calls only, so that fn in Data may use the arena.
func (a *Arena) NextData(off int64) (start, end int64) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	size := a.size.Load()
	if a.done || off >= size {
		return 0, 0
	}
	fd := int(a.file.Fd())
	start, err := unix.Seek(fd, PageSize+off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // nothing behind off
		return 0, 0
	}
	if err != nil { // no such call on this kernel: everything may be data
		return off, size
	}
	end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
	if err != nil {
		end = PageSize + size
	}
	start, end = (start-PageSize)&^(PageSize-1), roundUp(end-PageSize)
	return max(start, off), min(end, size)
}

// Close unmaps the memory and closes the fd; the data lives on while somebody else holds the file. Slices of it fault afterwards. Idempotent.
func (a *Arena) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.done {
		return nil
	}
	a.done = true
	a.size.Store(0)
	return errors.Join(unix.Munmap(a.mem), a.file.Close())
}
