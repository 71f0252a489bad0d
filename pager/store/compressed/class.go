package compressed

import (
	"math/bits"
	"sync"

	"machpager/internal/failpoint"
	"machpager/pager/store"
)

// class is the slabs of one size of pieces.
type class struct {
	number int // immutable
	size   int // immutable; bytes of a piece
	n      int // immutable; pieces of a slab

	mu     sync.Mutex
	partly [buckets]*slab // guarded by mu; with free pieces, by how much is used
	slabs  int            // guarded by mu
	free   int            // guarded by mu; pieces, with the victim's
	victim *slab          // guarded by mu; in no list: its pieces are being moved away, and none is taken
	cursor int            // guarded by mu; of the victim: no piece before it is to be moved
	_      [64]byte
}

// alloc takes a piece, from the fullest slab there is; from a new one if there is none and grow says so. The error wraps ErrNoSpace.
func (c *class) alloc(ss *slabs, k kind, length int, slot store.Slot, grow bool) (where, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sl := c.fullest()
	if sl == nil && c.victim != nil && c.victim.used < c.n && c.victim.pins.Load() == 0 { // nobody reads what was moved: it can serve again
		sl, c.victim = c.victim, nil
		c.enlist(sl)
	}
	if sl == nil {
		if !grow {
			return 0, store.ErrNoSpace
		}
		var err error
		if sl, err = ss.add(); err != nil {
			return 0, err
		}
		c.adopt(sl)
		c.enlist(sl)
	}
	piece := c.take(sl, slot)
	return word(k, c.number, length, piece, sl.number), nil
}

// fullest is the slab with the fewest free pieces, or nil if there is none. Called with mu, like all below.
func (c *class) fullest() *slab {
	for b := buckets - 1; b >= 0; b-- {
		if c.partly[b] != nil {
			return c.partly[b]
		}
	}
	return nil
}

// adopt makes a free slab the class's, all of its pieces free.
func (c *class) adopt(sl *slab) {
	sl.class, sl.used = c.number, 0
	clear(sl.free[:])
	for i := 0; i < c.n; i += 64 {
		sl.free[i/64] = ^uint64(0) >> (64 - min(64, c.n-i))
	}
	if cap(sl.owners) < c.n {
		sl.owners = make([]store.Slot, c.n)
	}
	sl.owners = sl.owners[:c.n]
	c.slabs++
	c.free += c.n
}

// take takes a piece of a slab that has one and is in a list.
func (c *class) take(sl *slab, slot store.Slot) (piece int) {
	i := 0
	for sl.free[i] == 0 {
		i++
	}
	piece = i*64 + bits.TrailingZeros64(sl.free[i])
	c.mark(sl, piece, slot)
	c.enlist(sl)
	return piece
}

// mark makes a free piece a slot's.
func (c *class) mark(sl *slab, piece int, slot store.Slot) {
	sl.free[piece/64] &^= 1 << (piece % 64)
	sl.owners[piece] = slot
	sl.used++
	c.free--
}

// release gives a piece back, and reports whether its slab became nobody's.
func (c *class) release(ss *slabs, sl *slab, piece int) (emptied bool) {
	if sl.class != c.number || sl.free[piece/64]>>(piece%64)&1 != 0 {
		panic("BUG: free piece: it is free already")
	}
	sl.free[piece/64] |= 1 << (piece % 64)
	sl.used--
	c.free++
	if sl == c.victim {
		return c.retire(ss)
	}
	if sl.used > 0 {
		c.enlist(sl)
		return false
	}
	c.unlist(sl)
	c.disown(ss, sl)
	return true
}

// disown makes a slab without a used piece nobody's.
func (c *class) disown(ss *slabs, sl *slab) {
	c.slabs--
	c.free -= c.n
	sl.class = -1
	ss.book.Free(store.Slot(sl.number), 1, true)
}

// retire makes the victim nobody's, if nothing is in it and nobody reads what was. Readers that come later see that it was moved.
func (c *class) retire(ss *slabs) bool {
	if c.victim.used > 0 || c.victim.pins.Load() > 0 {
		return false
	}
	c.disown(ss, c.victim)
	c.victim = nil
	return true
}

// enlist puts a slab into the list it belongs to now.
func (c *class) enlist(sl *slab) {
	b := sl.used * buckets / c.n
	if sl.used == c.n {
		b = -1
	}
	if b == sl.bucket {
		return
	}
	c.unlist(sl)
	if b < 0 {
		return
	}
	sl.bucket, sl.next = b, c.partly[b]
	if sl.next != nil {
		sl.next.prev = sl
	}
	c.partly[b] = sl
}

func (c *class) unlist(sl *slab) {
	if sl.bucket < 0 {
		return
	}
	if sl.prev != nil {
		sl.prev.next = sl.next
	} else {
		c.partly[sl.bucket] = sl.next
	}
	if sl.next != nil {
		sl.next.prev = sl.prev
	}
	sl.prev, sl.next, sl.bucket = nil, nil, -1
}

// loose reports whether more than an eighth of the pieces, and a slab, are free.
func (c *class) loose() bool { return c.free > c.n+c.slabs*c.n/8 }

// compact moves one piece out of the slab that is used least, and reports whether a slab became nobody's.
func (c *class) compact(ss *slabs, ix *index) (emptied bool) {
	if c.victim == nil {
		for b := range c.partly {
			if c.victim = c.partly[b]; c.victim != nil {
				break
			}
		}
		if c.victim == nil {
			return false
		}
		c.unlist(c.victim)
		c.cursor = 0
	}
	v := c.victim
	if v.used == 0 {
		return c.retire(ss)
	}
	for c.cursor < c.n && v.free[c.cursor/64]>>(c.cursor%64)&1 != 0 {
		c.cursor++
	}
	to := c.fullest()
	if to == nil {
		return false
	}
	if c.cursor == c.n { // what is left was being written or freed
		c.cursor = 0
		return false
	}
	piece := c.cursor
	c.cursor++
	e := ix.entry(v.owners[piece])
	old := where(e[0].Load())
	if !old.hasPiece() || old.slab() != v.number || old.piece() != piece {
		return false // not committed yet, or about to be freed
	}
	at := c.take(to, v.owners[piece])
	w := word(old.kind(), c.number, old.length(), at, to.number)
	copy(ss.piece(w), ss.piece(old))
	failpoint.Here("compressed.moving")
	if !e[0].CompareAndSwap(uint64(old), uint64(w)) {
		return c.release(ss, to, at) // freed meanwhile
	}
	failpoint.Here("compressed.moved")
	ss.moved.Add(1)
	return c.release(ss, v, piece)
}

// reclaim empties one slab of some class that has as many free pieces elsewhere. It is for when there are no free slabs left.
func (ss *slabs) reclaim(ix *index) bool {
	for i := range ss.classes {
		c := &ss.classes[i]
		c.mu.Lock()
		for range 2 * c.n { // all of one slab, even if another's rest is in the way
			if c.free < c.n {
				break
			}
			if c.compact(ss, ix) {
				c.mu.Unlock()
				return true
			}
		}
		c.mu.Unlock()
	}
	return false
}
