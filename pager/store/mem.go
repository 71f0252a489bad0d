package store

import (
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Memory is memory that a store or a page map lives in. Whether it outlives the process is its maker's business. Bytes and Words may be called
// from any goroutine; Grow, Discard and Close need the user's own order between them.
type Memory interface {
	Bytes() []byte              // all of it as of the last Grow; the base never moves, so slices taken before a Grow stay valid
	Words() []atomic.Uint64     // the same memory as 64-bit words
	Grow(size int64) error      // bytes; new bytes are zeros; never shrinks
	Discard(off, n int64) error // whole 4096-byte pages whose contents are no longer needed; they read as zeros
	Close() error
}

// Anonymous is Memory in an anonymous private mapping off the Go heap. It ends with the process.
type Anonymous struct {
	mu       sync.Mutex
	reserved []byte // guarded by mu; PROT_NONE beyond the size; nil after Close
	size     atomic.Int64
	base     unsafe.Pointer // immutable
}

var _ Memory = (*Anonymous)(nil)

// DefaultReserve is the address space, in bytes, that NewAnonymous reserves if it is told 0.
const DefaultReserve = 64 << 30

// NewAnonymous reserves address space for reserve bytes (0: DefaultReserve); the memory is empty until Grow.
func NewAnonymous(reserve int64) (*Anonymous, error) {
	if reserve == 0 {
		reserve = DefaultReserve
	}
	reserve = (reserve + SlotSize - 1) &^ (SlotSize - 1)
	b, err := unix.Mmap(-1, 0, int(reserve), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve memory: mmap %d bytes: %w (is ulimit -v set?)", reserve, err)
	}
	return &Anonymous{reserved: b, base: unsafe.Pointer(unsafe.SliceData(b))}, nil
}

// Bytes is all of the memory.
func (a *Anonymous) Bytes() []byte { return unsafe.Slice((*byte)(a.base), a.size.Load()) }

// Words is all of the memory as 64-bit words.
func (a *Anonymous) Words() []atomic.Uint64 {
	return unsafe.Slice((*atomic.Uint64)(a.base), a.size.Load()/8)
}

// Grow makes the memory at least size bytes, rounded up to whole pages.
func (a *Anonymous) Grow(size int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.size.Load()
	size = (size + SlotSize - 1) &^ (SlotSize - 1)
	switch {
	case size <= old:
		return nil
	case size > int64(len(a.reserved)):
		return fmt.Errorf("grow memory to %d bytes: only %d are reserved: %w", size, len(a.reserved), unix.ENOMEM)
	}
	if err := unix.Mprotect(a.reserved[old:size], unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return fmt.Errorf("grow memory: mprotect: %w", err)
	}
	a.size.Store(size)
	return nil
}

// Discard gives whole pages back to the system.
func (a *Anonymous) Discard(off, n int64) error {
	if off < 0 || n < 0 || off%SlotSize != 0 || n%SlotSize != 0 || off+n > a.size.Load() {
		return fmt.Errorf("discard memory %d+%d: %w", off, n, unix.EINVAL)
	}
	if n == 0 {
		return nil
	}
	if err := unix.Madvise(a.Bytes()[off:off+n], unix.MADV_DONTNEED); err != nil {
		return fmt.Errorf("discard memory: madvise: %w", err)
	}
	return nil
}

// Close unmaps the memory. Slices taken from it must not be used any more.
func (a *Anonymous) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.reserved == nil {
		return nil
	}
	b := a.reserved
	a.reserved = nil
	a.size.Store(0)
	if err := unix.Munmap(b); err != nil {
		return fmt.Errorf("close memory: munmap: %w", err)
	}
	return nil
}
