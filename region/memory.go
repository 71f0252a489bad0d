//go:build linux

package region

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/uffd"
)

// Region is a mapping of a part of a memory object. All methods may be called from any goroutine; the memory itself is like any other: who shares
// it must order accesses.
type Region struct {
	pager    *Pager   // immutable
	fd       *uffd.FD // immutable; the task's
	id       uint64   // immutable; the mapping's number
	readOnly bool     // immutable
	pageSize int64    // immutable; of the object
	size     int64    // immutable; bytes asked for
	delta    int64    // immutable; where they begin in mem
	mem      []byte   // immutable; the whole pages mapped, never touched through this slice but by tier C

	users   gate            // who uses the address range: Close waits for them before it is given away
	closing atomic.Bool     // set before the gate is shut
	ctx     context.Context // immutable; ends when Close begins
	cancel  context.CancelCauseFunc

	once sync.Once
	err  error // written inside once

	statsMu sync.Mutex
	stats   Stats // guarded by statsMu; the last ones heard
}

// address is where the mapping begins.
func (r *Region) address() uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(r.mem)))) }

// Bytes is the memory: exactly the bytes asked for. Touching it faults, and may wait for the pager; see the package comment for what that
// means in Go, and Guard for faults that cannot be resolved. nil after Close. A slice of it that is kept past Close must not be touched.
func (r *Region) Bytes() []byte {
	if r.closing.Load() {
		return nil
	}
	return r.mem[r.delta : r.delta+r.size : r.delta+r.size]
}

// Size is the number of bytes asked for, also after Close.
func (r *Region) Size() int64 { return r.size }

// PageSize is the size of the object's pages in bytes.
func (r *Region) PageSize() int { return int(r.pageSize) }

// enter keeps the address range until leave. ErrClosed when Close has begun.
func (r *Region) enter() error {
	if !r.users.enter() {
		return ErrClosed
	}
	return nil
}

func (r *Region) leave() { r.users.leave() }

// call makes a call about this mapping, which Close ends.
func (r *Region) call(ctx context.Context, what string, t ipc.Type, body any) (*ipc.Message, error) {
	if r.closing.Load() {
		return nil, fmt.Errorf("%s: %w", what, ErrClosed)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	m, err := r.pager.link.Call(ctx, t, body, nil)
	if err != nil && errors.Is(err, context.Canceled) && r.ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %w", what, ErrClosed)
	}
	return m, r.pager.failed(what, err)
}

// pages rounds a range of Bytes outward to pages, from the start of the mapping.
func (r *Region) pages(what string, off, n int64) (first, size int64, err error) {
	if off < 0 || n < 0 || off > r.size || n > r.size-off {
		return 0, 0, invalid("%s: offset %d and length %d, the region has %d bytes", what, off, n, r.size)
	}
	first = (r.delta + off) &^ (r.pageSize - 1)
	end := (r.delta + off + n + r.pageSize - 1) &^ (r.pageSize - 1)
	return first, end - first, nil
}

// Populate makes the pages of a range present, and with write writable, before it returns; bytes, rounded outward to pages. It is a message to the
// pager: it can be cancelled, and holds no P. Present is no promise for later: the pager may take a page back whenever it needs the frame. Errors:
// emm.ProtectionFailure for write on a read-only region, those of the pages (see FaultError), emm.ResourceShortage where the range exceeds the budget.
func (r *Region) Populate(ctx context.Context, off, n int64, write bool) error {
	first, size, err := r.pages("populate", off, n)
	if err != nil || n == 0 {
		return err
	}
	if write && r.readOnly {
		return fmt.Errorf("populate: %w", errReadOnly)
	}
	flags := uint32(0)
	if write {
		flags = ipc.PopulateWrite
	}
	m, err := r.call(ctx, "populate", ipc.TypePopulate, ipc.Populate{Mapping: r.id, Offset: first, Size: size, Flags: flags})
	if err != nil {
		return err
	}
	m.Close()
	return nil
}

// PageOut hands the pages of a range to the manager, where they were changed, and takes them out of memory, for all tasks that map the object
// (memory_object_lock_request: clean and flush); bytes, rounded outward to pages. The next touch is a data request. It returns when that is done. An
// error means that some of the pages stayed, with their contents.
func (r *Region) PageOut(ctx context.Context, off, n int64) error {
	first, size, err := r.pages("page out", off, n)
	if err != nil || n == 0 {
		return err
	}
	m, err := r.call(ctx, "page out", ipc.TypePageOut, ipc.PageOut{Mapping: r.id, Offset: first, Size: size})
	if err != nil {
		return err
	}
	m.Close()
	return nil
}

// Close gives the memory back (vm_deallocate). Goroutines that wait in a fault on it get a fault of the other kind (SIGSEGV; Guard returns it), those in ReadAt
// and WriteAt return with ErrClosed, calls to the pager end. Close waits for these, then for the pager, then unmaps; where Guards are being run, the
// inaccessible addresses are unmapped when these have ended, so that none of them meets somebody else's memory. Touching a slice kept past it
// is like touching freed memory. The contents live on in the object, if somebody else holds it. Idempotent; every Close waits for the first.
//
// A pager that does not acknowledge may still write to the range when it wakes up, and its guardian may poison it: the addresses then stay
// reserved, with nothing behind them, until the process ends.
func (r *Region) Close() error {
	r.once.Do(func() { r.err = r.close() })
	return r.err
}

func (r *Region) close() error {
	r.closing.Store(true)
	empty := r.users.shut()
	r.cancel(ErrClosed)
	base, size := unsafe.Pointer(unsafe.SliceData(r.mem)), uintptr(len(r.mem))
	// Nobody can begin to wait here any more. Taking the mapping away does not end a wait: who waits is woken, looks again, and finds no access.
	_, err := unix.MmapPtr(-1, 0, base, size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED)
	if err != nil {
		err = fmt.Errorf("close region: take the mapping away: %w", err)
	} else {
		r.fd.Wake(r.address(), uint64(size))
	}
	<-empty
	r.pager.mu.Lock()
	delete(r.pager.regions, r)
	r.pager.mu.Unlock()
	uerr := r.pager.undo(ipc.TypeUnmap, ipc.Unmap{Mapping: r.id})
	inside.after(func() {
		mapped.remove(r)
		if uerr == nil && err == nil {
			unix.MunmapPtr(base, size) // fails only for want of memory to split a mapping: then it stays, with nothing behind it
		}
	})
	if uerr != nil {
		return errors.Join(err, r.pager.failed("close region", uerr))
	}
	return err
}

// Stats tells what happened in this mapping so far. When the pager does not answer, or the region is closed, the numbers are the last ones heard.
func (r *Region) Stats() Stats {
	ctx, cancel := context.WithTimeout(context.Background(), statsPatience)
	defer cancel()
	m, err := r.call(ctx, "read statistics", ipc.TypeRegionStats, ipc.RegionStats{Mapping: r.id})
	r.statsMu.Lock()
	defer r.statsMu.Unlock()
	if err == nil {
		defer m.Close()
		if s, _, err := ipc.Decode[ipc.RegionStatsReply](m.Body); err == nil {
			r.stats = newStats(s)
		}
	}
	return r.stats
}

// statsPatience bounds what Stats waits.
const statsPatience = time.Second
