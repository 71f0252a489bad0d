// Package store is the contract between a memory manager and the paging space it keeps contents in, and what every store needs: memory
// that may outlive the process ([Memory]) and the book of free slots ([Allocator]).
//
// # Slots
//
// A store is an array of slots of [SlotSize] bytes, numbered from 1; 0 is [None]. Which slot holds which page is the manager's knowledge (its
// page map); which slots are free is the store's. A slot has one owner: from Alloc until Free the manager that allocated it, otherwise the store.
// An object page of N*4096 bytes takes N contiguous slots. Alloc gives one contiguous run if it can, so that 2 MiB paged out together are 512 slots
// in a row, written and read with one operation.
//
// A slot is written once between Alloc and Free. New contents go to new slots, the manager commits its page map when the write was
// successful, and frees the old slots then: the old contents are there until nobody can need them. The store does not reuse a slot before
// its Free, and may reuse it at once after; so the owner frees only what no operation and no view is reading.
//
// # Operations and buffers
//
// Read and Write take an [Op], which belongs to its caller and may be pooled. From the call until Done the Op and its Data are the
// store's: nobody else touches the Op, Data is not changed by others and, for a Read, not looked at. Done is called exactly once, whatever
// happens, with Err set; when it is called the Op and the Data are the caller's again, and the store keeps no reference to either. Done may run inline,
// inside Read or Write, or later on a goroutine of the store's. It must not block, may call any method but Close, and is called without any lock.
// Operations on different slots are not ordered: who needs an order waits for Done.
//
// Read and Write never block on I/O: they are called on fault readers. A store in memory answers inline; a store that needs I/O hands the Op to a
// worker. Alloc, Free and View do no I/O and hold locks for moments only.
//
// A store that has the contents in memory lends them: View returns the slots' own bytes, checked, and no copy is made. The view is
// read-only and ends with the Free of its slots. A store that cannot lend returns nil, nil; the caller reads instead.
//
// # Errors
//
// Contents are right or there is an error: a slot whose checksum does not match is [ErrCorrupt], never wrong data. A failed Read tells in Good how
// many leading slots are right; the slot behind them is bad, what comes after is unknown. After a failed Write the slots' contents are
// undefined; they are still the caller's to Free. An error may pass: the same Read may succeed later.
//
// # Restart
//
// A store that is to survive its process is given its memory. Contents and checksums live there and in files; free lists and counts do not.
// A manager that takes over calls Rebuild before anything else, with the slots that its page maps use; all others are free.
package store

import (
	"errors"
	"iter"
)

// SlotSize is the size of one slot in bytes.
const SlotSize = 4096

// Slot is the number of a slot. Valid slots are 1 to 1<<40.
type Slot uint64

// None is no slot.
const None Slot = 0

// MaxSlot is the largest slot number there is.
const MaxSlot Slot = 1 << 40

var (
	// ErrNoSpace says that paging space is full. It passes when slots are freed.
	ErrNoSpace = errors.New("no paging space")
	// ErrCorrupt says that stored contents are not what was written.
	ErrCorrupt = errors.New("stored contents are corrupted")
	// ErrClosed says that the store was closed.
	ErrClosed = errors.New("store is closed")
)

// Op is one read or write of a run of slots. See the package comment for whose it is when.
type Op struct {
	Slot     Slot      // first slot
	Data     []byte    // a whole number of slots: where to read to, or what to write
	Prefetch bool      // nobody waits: a store that queues serves others first
	Done     func(*Op) // called exactly once, perhaps inline
	Arg      any       // the caller's own

	// Results, valid from Done on.
	Err  error
	Good int // after a failed Read: how many leading slots are right

	// The store's, while it has the Op.
	next  *Op
	write bool
}

// Slots is the number of slots the operation is about.
func (op *Op) Slots() int { return len(op.Data) / SlotSize }

// SetWrite is for stores with a queue: it notes what the operation is, for IsWrite.
func (op *Op) SetWrite(write bool) { op.write = write }

// IsWrite is what SetWrite noted.
func (op *Op) IsWrite() bool { return op.write }

// Finish is for stores: it sets the result and calls Done. The Op must not be used after it.
func (op *Op) Finish(good int, err error) {
	op.Good, op.Err = good, err
	op.Done(op)
}

// Info is what there is of paging space, in bytes, and what the store can do.
type Info struct {
	Total, Used, Free int64
	// Lends says that View gives contents as a rule.
	Lends bool
}

// Store keeps the contents of slots. All methods may be called from any goroutine, except that Rebuild is called first or not at all, and Close last.
type Store interface {
	// Alloc gives a run of contiguous free slots: n of them if it can, otherwise fewer, always a positive multiple of unit. n is a positive
	// multiple of unit. The error wraps ErrNoSpace if not even unit slots in a row are free. Contents are undefined until written.
	Alloc(n, unit int) (Slot, int, error)
	// Free gives n slots back, which need not have come from one Alloc. It must follow the Done of every operation on them.
	Free(s Slot, n int)
	// Read reads op.Slots() slots from op.Slot into op.Data.
	Read(op *Op)
	// Write writes op.Data to op.Slots() slots from op.Slot.
	Write(op *Op)
	// View lends the contents of n slots, read-only, until they are freed. With an error the data ends before the first bad slot. nil, nil: not
	// lent, use Read.
	View(s Slot, n int) ([]byte, error)
	// Rebuild makes exactly the given runs allocated, and all other slots free.
	Rebuild(used iter.Seq2[Slot, int]) error
	// Info tells total, used and free bytes.
	Info() Info
	// Close waits for the operations under way. Later ones fail with ErrClosed. It is idempotent.
	Close() error
}
