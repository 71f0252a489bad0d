package pager

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync/atomic"

	"machpager/pager/emm"
	"machpager/pager/store"
)

// table is the table of objects, in memory that may outlive the process. Entries of 64 bytes, in words; entry 0 is the header:
//
//	header  magic and version
//	entry   commit: bit 0 used, bit 1 temporary, bit 2 stale, bits 8-15 log2 of the page size
//	        port, two words
//	        size in bytes
//
// The commit word is stored last when an entry is made, and goes first. Before and after the object's life it says stale: there may be a page map of
// this number that is nobody's.
type table struct{ mem store.Memory }

const (
	tableMagic = 0x6d616368_70675f01 // "machpg_", version 1
	entryWords = 8

	entryUsed      = 1 << 0
	entryTemporary = 1 << 1
	entryStale     = 1 << 2
	entryShift     = 8
)

// entry is an object as the table has it.
type entry struct {
	port      emm.Port
	size      int64 // bytes; of a temporary object a hint
	pageSize  int64 // bytes
	temporary bool
}

func openTable(mem store.Memory) (*table, error) {
	if len(mem.Words()) < entryWords {
		if err := mem.Grow(store.SlotSize); err != nil {
			return nil, fmt.Errorf("make table of objects: %w", err)
		}
	}
	switch w := &mem.Words()[0]; w.Load() {
	case 0:
		w.Store(tableMagic)
	case tableMagic:
	default:
		return nil, fmt.Errorf("open table of objects: magic is %#x, want %#x: written by another version", w.Load(), uint64(tableMagic))
	}
	return &table{mem}, nil
}

// len is the number of entries there is room for.
func (t *table) len() int { return len(t.mem.Words())/entryWords - 1 }

func (t *table) words(id int) []atomic.Uint64 { return t.mem.Words()[(id+1)*entryWords:][:entryWords] }

func (t *table) get(id int) (entry, bool) {
	w := t.words(id)
	c := w[0].Load()
	if c&entryUsed == 0 {
		return entry{}, false
	}
	e := entry{size: int64(w[3].Load()), pageSize: 1 << (c >> entryShift & 0x3f), temporary: c&entryTemporary != 0}
	binary.LittleEndian.PutUint64(e.port[:8], w[1].Load())
	binary.LittleEndian.PutUint64(e.port[8:], w[2].Load())
	return e, true
}

// stale reports whether a map may have been left, of an entry that is none.
func (t *table) stale(id int) bool { return t.words(id)[0].Load()&(entryUsed|entryStale) == entryStale }

// reserve makes room for an entry.
func (t *table) reserve(id int) error {
	if id >= t.len() {
		if err := t.mem.Grow(int64(len(t.mem.Bytes())) * 2); err != nil {
			return fmt.Errorf("grow table of objects: %w", err)
		}
	}
	t.drop(id)
	return nil
}

// put commits an entry for which there is room.
func (t *table) put(id int, e entry) {
	w := t.words(id)
	w[1].Store(binary.LittleEndian.Uint64(e.port[:8]))
	w[2].Store(binary.LittleEndian.Uint64(e.port[8:]))
	w[3].Store(uint64(e.size))
	c := uint64(entryUsed) | uint64(bits.TrailingZeros64(uint64(e.pageSize)))<<entryShift
	if e.temporary {
		c |= entryTemporary
	}
	w[0].Store(c)
}

// drop takes an entry out; its map is there still.
func (t *table) drop(id int) { t.words(id)[0].Store(entryStale) }

// clear says that nothing is left of an entry.
func (t *table) clear(id int) { t.words(id)[0].Store(0) }
