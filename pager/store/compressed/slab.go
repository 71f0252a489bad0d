package compressed

import (
	"fmt"
	"sync"
	"sync/atomic"

	"machpager/internal/failpoint"
	"machpager/pager/store"
)

const (
	slabSize  = 64 << 10
	maxPieces = slabSize / 64
	buckets   = 8
	growSlabs = 1024 // the data grows by so many slabs
)

// sizes are the lengths of pieces in bytes, by class, falling: a slab is cut into 16 pieces of 4096, 17 of 3840, ... 1024 of 64. Each is at most 15/16 of the one before
// (as far as 16 bytes allow), so that a page wastes 1/32 of its piece on average.
var sizes = func() (sizes []int) {
	for n := slabSize / store.SlotSize; n <= maxPieces; n++ {
		size := slabSize / n &^ 15
		if k := len(sizes); k == 0 || size <= sizes[k-1]*15/16 {
			sizes = append(sizes, size)
		}
	}
	return sizes
}()

// classOf is the class of a length, by 16 bytes.
var classOf = func() (of [store.SlotSize/16 + 1]uint8) {
	for i := range of {
		for c, size := range sizes {
			if size >= i*16 {
				of[i] = uint8(c)
			}
		}
	}
	return of
}()

// slab is what is known of one slab. What is not atomic is guarded by the mu of the class that has it.
type slab struct {
	pins   atomic.Int32           // readers
	number uint32                 // immutable
	class  int                    // -1: none has it
	used   int                    // pieces
	free   [maxPieces / 64]uint64 // a bit for each piece
	owners []store.Slot           // by piece

	bucket     int // in which list it is; -1: none
	prev, next *slab
}

func (sl *slab) unpin() { sl.pins.Add(-1) }

// slabs is all slabs.
type slabs struct {
	mem     store.Memory
	book    *store.Allocator // of slabs: their numbers are slots to it
	slack   uint64           // immutable; slabs
	classes []class          // immutable
	moved   atomic.Int64
	trimMu  sync.Mutex // held while free slabs seem to be used because their memory is given back

	mu    sync.Mutex
	bytes atomic.Pointer[[]byte]  // all of mem; replaced under mu
	table atomic.Pointer[[]*slab] // by number; replaced under mu
}

func (ss *slabs) init(mem store.Memory, limit, slack uint64) {
	ss.mem, ss.book, ss.slack = mem, store.NewAllocator(limit), slack
	b := mem.Bytes()
	ss.bytes.Store(&b)
	ss.table.Store(new([]*slab))
	ss.classes = make([]class, len(sizes))
	for i := range ss.classes {
		ss.classes[i].number, ss.classes[i].size, ss.classes[i].n = i, sizes[i], slabSize/sizes[i]
	}
}

// inUse is how many slabs are in use.
func (ss *slabs) inUse() int64 {
	_, used, _ := ss.book.Counts()
	return int64(used)
}

// pin keeps the slab of a word from being used for anything else, and finds it. nil: there is no such piece.
func (ss *slabs) pin(w where) *slab {
	t := *ss.table.Load()
	if int64(w.slab()) > int64(len(t)) || w.slab() == 0 || !w.valid() {
		return nil
	}
	sl := t[w.slab()-1]
	sl.pins.Add(1)
	return sl
}

// valid reports whether there can be such a piece.
func (w where) valid() bool {
	return w.class() < len(sizes) && w.piece() < slabSize/sizes[w.class()] && w.length() <= sizes[w.class()] && w.length() > 0
}

// piece is the contents that a word names. The word is valid.
func (ss *slabs) piece(w where) []byte {
	off := int64(w.slab()-1)*slabSize + int64(w.piece()*sizes[w.class()])
	return (*ss.bytes.Load())[off : off+int64(w.length()) : off+int64(w.length())]
}

// alloc takes a piece for length bytes of a slot. The error wraps ErrNoSpace.
func (ss *slabs) alloc(k kind, length int, slot store.Slot, ix *index) (where, error) {
	c := &ss.classes[classOf[(length+15)/16]]
	w, err := c.alloc(ss, k, length, slot, true)
	if err != nil && ss.reclaim(ix) {
		w, err = c.alloc(ss, k, length, slot, true)
	}
	for i := c.number - 1; err != nil && i >= 0; i-- { // a piece that is too large is better than none
		if larger, e := ss.classes[i].alloc(ss, k, length, slot, false); e == nil {
			return larger, nil
		}
	}
	return w, err
}

// free gives a piece back.
func (ss *slabs) free(w where, ix *index) {
	if !w.hasPiece() {
		return
	}
	c := &ss.classes[w.class()]
	c.mu.Lock()
	emptied := c.release(ss, (*ss.table.Load())[w.slab()-1], w.piece())
	for range 2 {
		if !c.loose() {
			break
		}
		emptied = c.compact(ss, ix) || emptied
	}
	c.mu.Unlock()
	if emptied {
		ss.trim()
	}
}

// trim gives the memory of free slabs beyond the slack back. An error leaves it where it is.
func (ss *slabs) trim() {
	if _, _, backed := ss.book.Counts(); backed <= ss.slack {
		return
	}
	ss.trimMu.Lock()
	defer ss.trimMu.Unlock()
	ss.book.Trim(ss.slack, func(s store.Slot, n int) error {
		failpoint.Here("compressed.discard")
		defer failpoint.Here("compressed.discarded")
		return ss.mem.Discard(int64(s-1)*slabSize, int64(n)*slabSize)
	})
}

// add takes a free slab. Called with a class.mu.
func (ss *slabs) add() (*slab, error) {
	n, _, err := ss.book.Alloc(1, 1)
	if err != nil { // perhaps only because free slabs are being trimmed
		ss.trimMu.Lock()
		n, _, err = ss.book.Alloc(1, 1)
		ss.trimMu.Unlock()
	}
	if err != nil {
		return nil, fmt.Errorf("allocate slab: %w", err)
	}
	if int(n) <= len(*ss.table.Load()) {
		return (*ss.table.Load())[n-1], nil
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if err := ss.reach(int(n)); err != nil {
		ss.book.Free(n, 1, false)
		return nil, fmt.Errorf("allocate slab: %w: %w", store.ErrNoSpace, err)
	}
	return (*ss.table.Load())[n-1], nil
}

// reach makes the data and the table reach to slab n. Called with mu.
func (ss *slabs) reach(n int) error {
	if n <= len(*ss.table.Load()) {
		return nil
	}
	capacity, _, _ := ss.book.Counts()
	n = int(min(capacity, uint64(n+growSlabs-1)/growSlabs*growSlabs))
	if err := ss.mem.Grow(int64(n) * slabSize); err != nil {
		return err
	}
	failpoint.Here("compressed.grown")
	b := ss.mem.Bytes()
	ss.bytes.Store(&b)
	t := append([]*slab(nil), *ss.table.Load()...)
	for len(t) < n {
		t = append(t, &slab{number: uint32(len(t) + 1), class: -1, bucket: -1})
	}
	ss.table.Store(&t)
	return nil
}
