// Package compressed is a store that keeps slots compressed in memory.
//
// A page of zeros takes no memory but its place in the index. Others are compressed one by one with S2 (an LZ4-class code of
// github.com/klauspost/compress), and are kept as they are if that would save less than an eighth: what is as good as incompressible is read back with
// a copy. The encoder itself is the quick test: on random contents it gives up after a fifteenth of the time that text takes. (Of S2, its slower
// variant, Snappy and Zstandard at its fastest, S2 is the one for paging: Snappy is no faster and no smaller, S2's slower variant takes 1.7 times as long to save a seventh, two halves of a page take longer than a
// whole one, and Zstandard makes text a quarter smaller, but takes 5 times as long to write and to read. What an LZ4-class code costs per page is what it finds to match: in units of a 4 KiB page of words,
// Go source takes 0.8, machine code 0.6, half random 0.45, random 0.06. On the machine of docs/benchmarks.md the unit is 9 us, so text goes out at less than half a GB/s per core; only what does
// not compress, or is zeros, is faster than 1 GB/s.) Nothing but zeros is stored once for several slots.
//
// Operations are answered inline. Contents are not lent: View returns nil, nil.
//
// # Layout
//
// The index has 16 bytes for each slot, in two words:
//
//	where    bits 0-1 kind (1 zeros, 2 compressed, 3 as it is), 2-7 class, 8-20 length in bytes, 21-31 piece, 32-63 slab; 0: nothing
//	sum      CRC-32C of the contents before compression
//
// The data is slabs of 64 KiB, numbered from 1, that are cut into equal pieces; see class. A slot's contents are in one piece.
//
// Both are valid at every instant: a piece and its sum are written before the one store of the word that names the piece. Which pieces are free is
// volatile; Rebuild finds it from the index.
//
// # Fragmentation
//
// Of each class at most an eighth of the pieces, and one slab more, is free: when there are more, each Free moves two pieces out of the slab
// that is used least, until it is empty and goes back. Moving is a copy and one compare-and-swap of the word; readers are not held up: they pin the slab, and look
// at the word again. So a slab whose pieces were moved serves again only when nobody has it pinned.
//
// # Locks
//
//	growMu (growing the index)
//	class.mu (slabs of a class and their pieces), one at a time
//	  slabs.trimMu (giving memory of free slabs back), slabs.mu (the table of slabs, growing the data)
//	    the allocators' own
package compressed

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/store"
)

// Options of a compressed store. nil or zero values are the defaults.
type Options struct {
	// Index and Data are the memories of the index and of the contents. They become the store's. If they have contents, those are an earlier
	// store's, and Rebuild must be called next. nil: anonymous memory, which ends with the process.
	Index, Data store.Memory
	// Capacity is how many bytes of contents, before compression, may be stored, rounded down to slots. 0: no bound of its own.
	Capacity int64
	// Limit is how many bytes of memory the contents may take when compressed, rounded down to slabs of 64 KiB. The index (16 bytes per slot)
	// comes on top. 0: no bound of its own. What an earlier store left may be more; nothing of it is lost.
	Limit int64
	// Slack is how many bytes of free slabs keep their memory, so that it can be reused without being given back and faulted in again.
	// 0: 8 MiB. Negative: none.
	Slack int64
}

// Store is a store in compressed memory.
type Store struct {
	index   index
	slots   *store.Allocator
	slabs   slabs
	bounded bool  // immutable; Capacity was given
	limit   int64 // immutable; bytes, 0: none
	closed  atomic.Bool

	zeros, raw, packed atomic.Int64 // slots by kind
	bytes              atomic.Int64 // lengths of what is stored
}

var _ store.Store = (*Store)(nil)

// maxPacked is the longest that a compressed page may be, in bytes.
const maxPacked = store.SlotSize * 7 / 8

// indexSlack is how many free slots keep their part of the index.
const indexSlack = 1 << 16

// New makes a compressed store, or takes one over.
func New(o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	switch {
	case o.Capacity < 0 || o.Capacity > 0 && o.Capacity < store.SlotSize:
		return nil, fmt.Errorf("make compressed store: capacity of %d bytes: need at least one slot of %d: %w", o.Capacity, store.SlotSize, unix.EINVAL)
	case o.Limit < 0 || o.Limit > 0 && o.Limit < slabSize:
		return nil, fmt.Errorf("make compressed store: limit of %d bytes: need at least one slab of %d: %w", o.Limit, slabSize, unix.EINVAL)
	}
	ix, data := o.Index, o.Data
	var err error
	if ix == nil {
		if ix, err = store.NewAnonymous(0); err != nil {
			return nil, fmt.Errorf("make compressed store: index: %w", err)
		}
	}
	if data == nil {
		if data, err = store.NewAnonymous(0); err != nil {
			if o.Index == nil {
				ix.Close()
			}
			return nil, fmt.Errorf("make compressed store: data: %w", err)
		}
	}
	slack := o.Slack
	switch {
	case slack == 0:
		slack = 8 << 20
	case slack < 0:
		slack = 0
	}
	s := &Store{slots: store.NewAllocator(uint64(o.Capacity / store.SlotSize)), bounded: o.Capacity > 0, limit: o.Limit / slabSize * slabSize}
	s.index.init(ix)
	limit := uint64(o.Limit / slabSize)
	if limit > 0 {
		limit = max(limit, uint64(len(data.Bytes())/slabSize))
	}
	s.slabs.init(data, limit, uint64(slack/slabSize))
	return s, nil
}

// scratch is what compressing one page needs.
type scratch [store.SlotSize + 512]byte

var scratches = sync.Pool{New: func() any { return new(scratch) }}

var zeroSlot [store.SlotSize]byte

// check is what Read and Write ask first.
func (s *Store) check(op *store.Op) error {
	switch {
	case len(op.Data) == 0 || len(op.Data)%store.SlotSize != 0:
		return fmt.Errorf("access slot %d: %d bytes are no whole number of slots: %w", op.Slot, len(op.Data), unix.EINVAL)
	case s.closed.Load():
		return fmt.Errorf("access slot %d: %w", op.Slot, store.ErrClosed)
	case op.Slot == store.None || op.Slot > store.MaxSlot || !s.index.reaches(op.Slot+store.Slot(op.Slots())-1):
		return fmt.Errorf("access slot %d: beyond the store: %w", op.Slot, unix.EINVAL)
	}
	return nil
}

// Read decompresses contents, and checks them.
func (s *Store) Read(op *store.Op) {
	if err := s.check(op); err != nil {
		op.Finish(0, err)
		return
	}
	n := op.Slots()
	for i := range n {
		if err := s.readSlot(op.Slot+store.Slot(i), op.Data[i*store.SlotSize:(i+1)*store.SlotSize:(i+1)*store.SlotSize]); err != nil {
			op.Finish(i, err)
			return
		}
	}
	op.Finish(n, nil)
}

func (s *Store) readSlot(slot store.Slot, buf []byte) error {
	e := s.index.entry(slot)
	for {
		w := where(e[0].Load())
		switch w.kind() {
		case kindNone:
			if w != 0 {
				return fmt.Errorf("read slot %d: its place in the index was bad: %w", slot, store.ErrCorrupt)
			}
			return fmt.Errorf("read slot %d: never written: %w", slot, store.ErrCorrupt)
		case kindZeros:
			clear(buf)
			return nil
		}
		sl := s.slabs.pin(w)
		if sl == nil {
			return fmt.Errorf("read slot %d: its place in the index is bad: %w", slot, store.ErrCorrupt)
		}
		if where(e[0].Load()) != w { // moved
			sl.unpin()
			continue
		}
		err := unpack(buf, s.slabs.piece(w), w.kind())
		sum := uint32(e[1].Load())
		sl.unpin()
		if err == nil {
			if got := store.Sum(buf); got != sum {
				err = fmt.Errorf("CRC-32C is %08x, was %08x when written", got, sum)
			}
		}
		if err != nil {
			return fmt.Errorf("read slot %d: %w: %w", slot, store.ErrCorrupt, err)
		}
		return nil
	}
}

var errLength = errors.New("compressed contents are not those of one slot")

func unpack(buf, piece []byte, k kind) error {
	if k == kindRaw {
		if len(piece) != len(buf) {
			return errLength
		}
		copy(buf, piece)
		return nil
	}
	if n, err := s2.DecodedLen(piece); err != nil || n != len(buf) {
		return errLength
	}
	_, err := s2.Decode(buf, piece)
	return err
}

// Write compresses contents.
func (s *Store) Write(op *store.Op) {
	if err := s.check(op); err != nil {
		op.Finish(0, err)
		return
	}
	sc := scratches.Get().(*scratch)
	n := op.Slots()
	for i := range n {
		if err := s.writeSlot(op.Slot+store.Slot(i), op.Data[i*store.SlotSize:(i+1)*store.SlotSize], sc); err != nil {
			scratches.Put(sc)
			op.Finish(i, err)
			return
		}
	}
	scratches.Put(sc)
	op.Finish(n, nil)
}

func (s *Store) writeSlot(slot store.Slot, data []byte, sc *scratch) error {
	e := s.index.entry(slot)
	if isZero(data) {
		s.commit(e, word(kindZeros, 0, 0, 0, 0))
		return nil
	}
	packed, k := s2.Encode(sc[:], data), kindPacked
	if len(packed) > maxPacked {
		packed, k = data, kindRaw
	}
	w, err := s.slabs.alloc(k, len(packed), slot, &s.index)
	if err != nil {
		return fmt.Errorf("write slot %d: %w", slot, err)
	}
	copy(s.slabs.piece(w), packed)
	failpoint.Here("compressed.copied")
	e[1].Store(uint64(store.Sum(data)))
	failpoint.Here("compressed.summed")
	s.commit(e, w)
	return nil
}

// isZero reports whether there is nothing but zeros. Most pages tell by their first word.
func isZero(b []byte) bool {
	return binary.LittleEndian.Uint64(b) == 0 && string(b) == string(zeroSlot[:])
}

// commit stores a slot's word, and frees what the old one named.
func (s *Store) commit(e entry, w where) {
	old := where(e[0].Swap(uint64(w)))
	failpoint.Here("compressed.committed")
	s.count(w, 1)
	if old != 0 {
		s.count(old, -1)
		s.slabs.free(old, &s.index)
	}
}

func (s *Store) count(w where, n int64) {
	switch w.kind() {
	case kindZeros:
		s.zeros.Add(n)
		return
	case kindPacked:
		s.packed.Add(n)
	case kindRaw:
		s.raw.Add(n)
	}
	s.bytes.Add(n * int64(w.length()))
}

// View lends nothing: the contents are compressed.
func (s *Store) View(store.Slot, int) ([]byte, error) { return nil, nil }

// Alloc takes slots, and makes the index hold them.
func (s *Store) Alloc(n, unit int) (store.Slot, int, error) {
	if s.closed.Load() {
		return store.None, 0, fmt.Errorf("allocate %d slots: %w", n, store.ErrClosed)
	}
	return s.slots.AllocReaching(n, unit, s.index.reach)
}

// Free gives slots and their memory back.
func (s *Store) Free(slot store.Slot, n int) {
	if s.closed.Load() {
		return
	}
	for i := range store.Slot(n) {
		if e := s.index.entry(slot + i); e[0].Load() != 0 {
			s.commit(e, 0)
		}
	}
	s.slots.Free(slot, n, true)
	if _, _, backed := s.slots.Counts(); backed > indexSlack {
		s.slots.Trim(indexSlack/2, s.index.discard) // an error leaves the memory where it is
	}
}

// Info tells the capacity; without one, what is used and what the limit leaves if nothing more can be compressed.
func (s *Store) Info() store.Info {
	capacity, used, _ := s.slots.Counts()
	i := store.Info{Total: int64(capacity) * store.SlotSize, Used: int64(used) * store.SlotSize}
	free := i.Total - i.Used
	var si unix.Sysinfo_t
	switch {
	case s.limit > 0:
		free = min(free, s.limit-s.slabs.inUse()*slabSize)
	case !s.bounded && unix.Sysinfo(&si) == nil:
		free = min(free, int64(si.Freeram)*int64(si.Unit))
	}
	i.Free = max(free, 0) &^ (store.SlotSize - 1)
	i.Total = i.Used + i.Free
	return i
}

// Stats is what is stored, and what it takes.
type Stats struct {
	Zeros, Raw, Packed int64 // slots: of zeros, not compressed, compressed
	Bytes              int64 // lengths of what is stored, together
	Memory             int64 // bytes of the slabs in use
	Moved              int64 // pieces moved to empty slabs, ever
}

// Stats tells what is stored. The numbers are taken one after the other.
func (s *Store) Stats() Stats {
	return Stats{
		Zeros: s.zeros.Load(), Raw: s.raw.Load(), Packed: s.packed.Load(), Bytes: s.bytes.Load(),
		Memory: s.slabs.inUse() * slabSize, Moved: s.slabs.moved.Load(),
	}
}

// Close closes the memories. It must not be called while operations are under way.
func (s *Store) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	if err := errors.Join(s.index.mem.Close(), s.slabs.mem.Close()); err != nil {
		return fmt.Errorf("close compressed store: %w", err)
	}
	return nil
}
