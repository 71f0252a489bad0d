package compressed

import (
	"sync"
	"sync/atomic"

	"machpager/pager/store"
)

// where is the word of a slot that tells where its contents are. See the package comment.
type where uint64

type kind uint8

const (
	kindNone   kind = iota
	kindZeros       // no piece
	kindPacked      // compressed
	kindRaw         // as it is
)

// whereBad is the word of a slot whose word made no sense to Rebuild.
const whereBad = where(1) << 63

func word(k kind, class, length, piece int, slab uint32) where {
	return where(k) | where(class)<<2 | where(length)<<8 | where(piece)<<21 | where(slab)<<32
}

func (w where) kind() kind   { return kind(w & 3) }
func (w where) class() int   { return int(w >> 2 & 0x3f) }
func (w where) length() int  { return int(w >> 8 & 0x1fff) }
func (w where) piece() int   { return int(w >> 21 & 0x7ff) }
func (w where) slab() uint32 { return uint32(w >> 32) }

// hasPiece reports whether the word names a piece.
func (w where) hasPiece() bool { return w.kind() >= kindPacked }

const (
	entryWords = 2
	entrySize  = entryWords * 8
	pageSlots  = store.SlotSize / entrySize // entries in a page of the index
)

// entry is a slot's two words.
type entry []atomic.Uint64

// index has an entry for each slot.
type index struct {
	mem    store.Memory
	growMu sync.Mutex
	words  atomic.Pointer[[]atomic.Uint64] // all of mem; replaced under growMu
}

func (x *index) init(mem store.Memory) {
	x.mem = mem
	w := mem.Words()
	x.words.Store(&w)
}

// reaches reports whether slot has an entry.
func (x *index) reaches(slot store.Slot) bool {
	return int64(slot)*entryWords <= int64(len(*x.words.Load()))
}

func (x *index) entry(slot store.Slot) entry {
	w := *x.words.Load()
	return w[(slot-1)*entryWords : slot*entryWords]
}

// reach makes the index reach to the group of slot last.
func (x *index) reach(last store.Slot) error {
	if x.reaches(last) {
		return nil
	}
	x.growMu.Lock()
	defer x.growMu.Unlock()
	groups := int64(last-1)/store.GroupSlots + 1
	if err := x.mem.Grow(groups * store.GroupSlots * entrySize); err != nil {
		return err
	}
	w := x.mem.Words()
	x.words.Store(&w)
	return nil
}

// discard gives the pages back in which only entries of the run are, all of them 0.
func (x *index) discard(slot store.Slot, n int) error {
	first := (int64(slot-1) + pageSlots - 1) / pageSlots
	end := (int64(slot-1) + int64(n)) / pageSlots
	if first >= end {
		return nil
	}
	return x.mem.Discard(first*store.SlotSize, (end-first)*store.SlotSize)
}
