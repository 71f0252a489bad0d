package compressed

import (
	"iter"

	"machpager/pager/store"
)

// sparse is implemented by memory that knows where it may hold anything but zeros.
type sparse interface {
	Data(fn func(off, n int64) bool)
}

// Rebuild takes over what an earlier store left in the memories. A slot whose place makes no sense is corrupt from then on; the others are not touched by that.
func (s *Store) Rebuild(used iter.Seq2[store.Slot, int]) error {
	words := *s.index.words.Load()
	kept, err := s.slots.ResetKept(len(words)/entryWords, used)
	if err != nil {
		return err
	}
	s.zeros.Store(0)
	s.raw.Store(0)
	s.packed.Store(0)
	s.bytes.Store(0)
	s.slabs.mu.Lock()
	if err = s.slabs.forget(); err == nil {
		s.index.each(func(i int, w where) {
			e := words[i*entryWords:]
			switch {
			case !kept.Has(i):
				e[0].Store(0)
			case w == 0:
			case w.kind() == kindZeros, w.hasPiece() && s.slabs.claim(w, store.Slot(i+1)):
				s.count(w, 1)
			default:
				e[0].Store(uint64(whereBad))
			}
		})
		err = s.slabs.settle()
	}
	s.slabs.mu.Unlock()
	if err != nil {
		return err
	}
	for i := range s.slabs.classes { // what is in no map any more has left holes
		c := &s.slabs.classes[i]
		c.mu.Lock()
		for again := c.slabs * c.n; again > 0 && c.loose(); again-- {
			c.compact(&s.slabs, &s.index)
		}
		c.mu.Unlock()
	}
	s.slabs.trim()
	return nil
}

// each tells the entries that may be something, by slot less one.
func (x *index) each(f func(i int, w where)) {
	words := *x.words.Load()
	part := func(off, n int64) bool {
		for i := int(off) / entrySize; i < int(off+n)/entrySize; i++ {
			if w := words[i*entryWords].Load(); w != 0 {
				f(i, where(w))
			}
		}
		return true
	}
	if m, ok := x.mem.(sparse); ok {
		m.Data(part)
	} else {
		part(0, int64(len(words))*8)
	}
}

// forget makes all slabs nobody's. Called with mu; nobody else uses the store.
func (ss *slabs) forget() error {
	for i := range ss.classes {
		c := &ss.classes[i]
		c.partly, c.slabs, c.free, c.victim = [buckets]*slab{}, 0, 0, nil
	}
	if err := ss.reach(len(*ss.bytes.Load()) / slabSize); err != nil {
		return err
	}
	for _, sl := range *ss.table.Load() {
		sl.class, sl.bucket, sl.prev, sl.next = -1, -1, nil, nil
	}
	return nil
}

// claim makes a piece a slot's. It reports whether there is such a piece and it was nobody's.
func (ss *slabs) claim(w where, slot store.Slot) bool {
	t := *ss.table.Load()
	if w.slab() == 0 || int64(w.slab()) > int64(len(t)) || !w.valid() || w.kind() == kindRaw && w.length() != store.SlotSize {
		return false
	}
	sl, c := t[w.slab()-1], &ss.classes[w.class()]
	if sl.class < 0 {
		c.adopt(sl)
	}
	if sl.class != c.number || sl.free[w.piece()/64]>>(w.piece()%64)&1 == 0 {
		return false
	}
	c.mark(sl, w.piece(), slot)
	return true
}

// settle puts the slabs into their lists, and makes the book of free ones. Called with mu.
func (ss *slabs) settle() error {
	t := *ss.table.Load()
	return ss.book.Reset(uint64(len(t)), func(yield func(store.Slot, int) bool) {
		for _, sl := range t {
			if sl.class < 0 {
				continue
			}
			ss.classes[sl.class].enlist(sl)
			if !yield(store.Slot(sl.number), 1) {
				return
			}
		}
	})
}
