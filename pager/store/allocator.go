package store

import (
	"fmt"
	"iter"
	"math/bits"
	"sync"
)

// GroupSlots is the number of slots of a group. A run never crosses from one group to the next.
const GroupSlots = 1 << 14

const groupWords = GroupSlots / 64

// trimSlots is how many slots Trim holds back at once, at most; near the capacity it holds back none, so that Alloc does not miss them.
const trimSlots = 512

// Allocator is the book of free slots of a store. It is volatile: a restarted store makes a new one, with Reset. It also knows which free slots
// still hold memory ("backed"), so that memory can be given back in runs instead of slot by slot. From any goroutine.
//
// It is a bitmap by groups, searched first fit: contents gather at low numbers, and a run is taken from a fresh group rather than in pieces.
type Allocator struct {
	capacity uint64 // immutable; in slots

	mu     sync.Mutex
	groups []*group // guarded by mu
	first  int      // guarded by mu; no group before it has a free slot
	used   uint64   // guarded by mu; with those being trimmed
	trims  uint64   // guarded by mu; slots being trimmed
	backed uint64   // guarded by mu; free slots that hold memory
	known  uint64   // guarded by mu; slots in groups
}

type group struct {
	free   bitmap
	backed bitmap // subset of free
	nfree  int
	slots  int
	limit  int // no free run is longer
}

// NewAllocator makes a book of capacity free slots. 0 is no bound but MaxSlot.
func NewAllocator(capacity uint64) *Allocator {
	if capacity == 0 || capacity > uint64(MaxSlot) {
		capacity = uint64(MaxSlot)
	}
	return &Allocator{capacity: capacity}
}

// Alloc takes a run of n slots, or of fewer, but a positive multiple of unit. It fails with ErrNoSpace.
func (a *Allocator) Alloc(n, unit int) (Slot, int, error) {
	if unit <= 0 || unit > GroupSlots || n <= 0 || n%unit != 0 {
		return None, 0, fmt.Errorf("allocate %d slots by %d: not a positive multiple", n, unit)
	}
	n = min(n, GroupSlots/unit*unit)
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.first < len(a.groups) && a.groups[a.first].nfree == 0 {
		a.first++
	}
	for i := a.first; i < len(a.groups); i++ {
		g := a.groups[i]
		if g.limit < n {
			continue
		}
		start, length := g.run(n)
		if length >= n {
			return a.take(i, start, n), n, nil
		}
		g.limit = length
	}
	if g := a.grow(); g != nil && g.slots >= n {
		return a.take(len(a.groups)-1, 0, n), n, nil
	}
	for { // no run of n: the longest there is
		best := -1
		for i := a.first; i < len(a.groups); i++ {
			if l := a.groups[i].limit; l >= unit && (best < 0 || l > a.groups[best].limit) {
				best = i
			}
		}
		if best < 0 {
			return None, 0, fmt.Errorf("allocate %d slots: %d of %d are used: %w", n, a.used, a.capacity, ErrNoSpace)
		}
		g := a.groups[best]
		start, length := g.run(g.limit)
		if length < g.limit {
			g.limit = length
			continue
		}
		m := min(length, n) / unit * unit
		return a.take(best, start, m), m, nil
	}
}

// grow adds a group, or returns nil at the capacity. Called with mu.
func (a *Allocator) grow() *group {
	left := a.capacity - a.known
	if left == 0 {
		return nil
	}
	g := &group{slots: int(min(left, GroupSlots))}
	g.free.set(0, g.slots)
	g.nfree, g.limit = g.slots, g.slots
	a.groups = append(a.groups, g)
	a.known += uint64(g.slots)
	return g
}

// take marks n slots of group i allocated. Called with mu; they are free.
func (a *Allocator) take(i, start, n int) Slot {
	g := a.groups[i]
	g.free.clear(start, n)
	g.nfree -= n
	a.backed -= uint64(g.backed.clear(start, n))
	a.used += uint64(n)
	return Slot(i*GroupSlots + start + 1)
}

// Free gives slots back. backed: they may hold memory. Freeing what is free is a broken invariant, and panics.
func (a *Allocator) Free(s Slot, n int, backed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.free(s, n, backed)
}

// free is Free. Called with mu.
func (a *Allocator) free(s Slot, n int, backed bool) {
	for n > 0 {
		g, start, m, ok := a.piece(s, n)
		if !ok || g.free.set(start, m) != m {
			panic(fmt.Sprintf("BUG: free slots %d+%d: not allocated", s, m))
		}
		g.nfree += m
		g.limit = g.slots
		if backed {
			a.backed += uint64(g.backed.set(start, m))
		}
		a.used -= uint64(m)
		a.first = min(a.first, int(s-1)/GroupSlots)
		s, n = s+Slot(m), n-m
	}
}

// piece is the part of a run that lies in its first group. Called with mu.
func (a *Allocator) piece(s Slot, n int) (g *group, start, m int, ok bool) {
	if s == None || uint64(s)+uint64(n)-1 > a.known || n <= 0 {
		return nil, 0, n, false
	}
	i := int(s - 1)
	g, start = a.groups[i/GroupSlots], i%GroupSlots
	return g, start, min(n, g.slots-start), true
}

// Trim gives the memory of free slots back by discard until at most keep free slots hold any, or fewer than 2048 slots are free: those will be wanted
// soon. Highest slots first, in runs. They are nobody's while discard runs, which is without the lock. It stops at the first error.
func (a *Allocator) Trim(keep uint64, discard func(s Slot, n int) error) error {
	return a.TrimRuns(keep, 1, discard)
}

// TrimRuns is Trim for runs of at least least slots, up to 512; shorter ones keep their memory, until their neighbours are free too, or they are allocated.
func (a *Allocator) TrimRuns(keep uint64, least int, discard func(s Slot, n int) error) error {
	for below := MaxSlot + 1; ; {
		s, n := a.victim(keep, least, &below)
		if n == 0 {
			return nil
		}
		err := discard(s, n)
		a.mu.Lock()
		a.trims -= uint64(n)
		a.free(s, n, err != nil)
		a.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// victim allocates the highest run of backed free slots below a slot, which becomes its first.
func (a *Allocator) victim(keep uint64, least int, below *Slot) (Slot, int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.backed <= keep || a.capacity-a.used < 4*trimSlots {
		return None, 0
	}
	top := int(min(uint64(*below-1), a.known)) // slots to look at
	for i := (top - 1) / GroupSlots; i >= 0 && top > 0; i-- {
		for end := top - i*GroupSlots; end > 0; {
			if end = a.groups[i].backed.last(end) + 1; end == 0 {
				break
			}
			start := max(a.groups[i].backed.lastClear(end)+1, end-trimSlots)
			if end-start >= least {
				a.trims += uint64(end - start)
				*below = a.take(i, start, end-start)
				return *below, end - start
			}
			end = start
		}
		top = i * GroupSlots
	}
	return None, 0
}

// AllocReaching takes a run as Alloc does, and has the store's memory reach to its last slot. If that fails, with any error, nothing is taken, and it is ErrNoSpace too.
func (a *Allocator) AllocReaching(n, unit int, reach func(last Slot) error) (Slot, int, error) {
	s, n, err := a.Alloc(n, unit)
	if err != nil {
		return None, 0, err
	}
	if err := reach(s + Slot(n) - 1); err != nil {
		a.Free(s, n, false)
		return None, 0, fmt.Errorf("allocate %d slots: %w: %w", n, ErrNoSpace, err)
	}
	return s, n, nil
}

// Kept says of each slot of an earlier store whether it is still used.
type Kept []uint64

// Has asks for the slot i+1.
func (k Kept) Has(i int) bool { return k[i/64]>>(i%64)&1 != 0 }

// ResetKept is Reset, and tells which of the slots up to high the runs are.
func (a *Allocator) ResetKept(high int, used iter.Seq2[Slot, int]) (Kept, error) {
	k := make(Kept, (high+63)/64)
	err := a.Reset(uint64(high), func(yield func(Slot, int) bool) {
		for s, n := range used {
			if !yield(s, n) {
				return
			}
			for i := int(s - 1); i < int(s-1)+n; i++ {
				k[i/64] |= 1 << (i % 64)
			}
		}
	})
	return k, err
}

// Reset makes exactly the given runs allocated. The slots up to high that are free are taken to be backed.
func (a *Allocator) Reset(high uint64, used iter.Seq2[Slot, int]) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.groups, a.first, a.used, a.trims, a.backed, a.known = nil, 0, 0, 0, 0, 0
	for a.known < high {
		g := a.grow()
		if g == nil {
			break
		}
		a.backed += uint64(g.backed.set(0, g.slots))
	}
	for s, n := range used {
		for n > 0 {
			g, start, m, ok := a.piece(s, n)
			if !ok {
				return fmt.Errorf("rebuild free slots: %d+%d is beyond the store: %w", s, n, ErrCorrupt)
			}
			if g.free.clear(start, m) != m {
				return fmt.Errorf("rebuild free slots: %d+%d is used twice: %w", s, m, ErrCorrupt)
			}
			g.nfree -= m
			a.backed -= uint64(g.backed.clear(start, m))
			a.used += uint64(m)
			s, n = s+Slot(m), n-m
		}
	}
	return nil
}

// Counts are slots: those there may be, those allocated, and those free but still holding memory.
func (a *Allocator) Counts() (capacity, used, backed uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.capacity, a.used - a.trims, a.backed
}

// Allocated reports whether all of the run is allocated. It is for checks.
func (a *Allocator) Allocated(s Slot, n int) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for n > 0 {
		g, start, m, ok := a.piece(s, n)
		if !ok || g.free.next(start, start+m, true) < start+m {
			return false
		}
		s, n = s+Slot(m), n-m
	}
	return true
}

// run is the first free run of at least n slots, or the longest free run.
func (g *group) run(n int) (start, length int) {
	for pos := g.free.next(0, GroupSlots, true); pos < GroupSlots; {
		end := g.free.next(pos, min(pos+n, GroupSlots), false)
		if end-pos > length {
			start, length = pos, end-pos
			if length >= n {
				break
			}
		}
		pos = g.free.next(end, GroupSlots, true)
	}
	return start, length
}

// bitmap has a bit per slot of a group.
type bitmap [groupWords]uint64

// each calls f with the words that the run touches, and a mask of its bits in each.
func (b *bitmap) each(start, n int, f func(w *uint64, mask uint64)) {
	for n > 0 {
		lo := start % 64
		m := min(n, 64-lo)
		f(&b[start/64], (^uint64(0)>>(64-m))<<lo)
		start, n = start+m, n-m
	}
}

// set sets n bits and returns how many were clear.
func (b *bitmap) set(start, n int) (changed int) {
	b.each(start, n, func(w *uint64, mask uint64) {
		changed += bits.OnesCount64(mask &^ *w)
		*w |= mask
	})
	return changed
}

// clear clears n bits and returns how many were set.
func (b *bitmap) clear(start, n int) (changed int) {
	b.each(start, n, func(w *uint64, mask uint64) {
		changed += bits.OnesCount64(mask & *w)
		*w &^= mask
	})
	return changed
}

// next is the first bit from pos on that is set, or clear; end if there is none before it.
func (b *bitmap) next(pos, end int, set bool) int {
	var flip uint64
	if !set {
		flip = ^uint64(0)
	}
	for pos < end {
		if w := (b[pos/64] ^ flip) >> (pos % 64); w != 0 {
			return min(pos+bits.TrailingZeros64(w), end)
		}
		pos = (pos/64 + 1) * 64
	}
	return end
}

// last is the highest bit below pos that is set, or -1.
func (b *bitmap) last(pos int) int {
	for pos > 0 {
		i := (pos - 1) / 64
		if w := b[i] << (63 - (pos-1)%64); w != 0 {
			return pos - 1 - bits.LeadingZeros64(w)
		}
		pos = i * 64
	}
	return -1
}

// lastClear is the highest clear bit below pos, or -1.
func (b *bitmap) lastClear(pos int) int {
	for pos > 0 {
		i := (pos - 1) / 64
		if w := ^b[i] << (63 - (pos-1)%64); w != 0 {
			return pos - 1 - bits.LeadingZeros64(w)
		}
		pos = i * 64
	}
	return -1
}
