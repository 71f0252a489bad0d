package pager

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"

	"machpager/pager/store"
)

// shares counts the page maps that name a slot, where it is more than one. A page is shared as a whole: its first slot stands for all of it. Whoever
// frees slots that a map named, gives shares back here; the last one frees. The counts are volatile: after a restart the maps tell them.
//
// A share can only be made of a slot that a map names, with the lock of that map's object. So a slot that is being freed gets no new ones.
type shares struct {
	mu     sync.Mutex
	groups map[store.Slot]*shareGroup // guarded by mu; by slot / shareSlots; none without shares
}

const shareSlots = 512

type shareGroup struct {
	shared int                // slots whose count is not 0
	more   [shareSlots]uint32 // maps that name the slot, beyond the first
}

// add counts one more map for each page of words.
func (s *shares) add(words []atomic.Uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var g *shareGroup
	last := ^store.Slot(0)
	for i := range words {
		w := words[i].Load()
		if w == 0 {
			continue
		}
		slot := wordSlot(w)
		if at := slot / shareSlots; at != last {
			g, last = s.group(at), at
		}
		g.set(slot, g.more[slot%shareSlots]+1)
	}
}

// set says how many maps name a page. From New.
func (s *shares) set(slot store.Slot, maps int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.group(slot/shareSlots).set(slot, uint32(maps-1))
}

// group is the group of this number, made if need be. Called with mu.
func (s *shares) group(at store.Slot) *shareGroup {
	g := s.groups[at]
	if g == nil {
		if s.groups == nil {
			s.groups = make(map[store.Slot]*shareGroup)
		}
		g = new(shareGroup)
		s.groups[at] = g
	}
	return g
}

func (g *shareGroup) set(slot store.Slot, more uint32) {
	p := &g.more[slot%shareSlots]
	switch {
	case *p == 0 && more != 0:
		g.shared++
	case *p != 0 && more == 0:
		g.shared--
	}
	*p = more
}

// drop gives back one share of each page of runs, which are pages of unit slots, and appends those that were the last ones to last.
func (s *shares) drop(last, runs []slotRun, unit int) []slotRun {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range runs {
		for slot, end := r.slot, r.slot+store.Slot(r.n); slot < end; {
			at := slot / shareSlots
			g := s.groups[at]
			for ; slot < end && slot/shareSlots == at; slot += store.Slot(unit) {
				if g == nil || g.more[slot%shareSlots] == 0 {
					last = appendSlots(last, slot, unit)
					continue
				}
				g.set(slot, g.more[slot%shareSlots]-1)
				if g.shared == 0 {
					delete(s.groups, at)
					g = nil
				}
			}
		}
	}
	return last
}

// count is the number of slots with shares.
func (s *shares) count() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.groups {
		n += g.shared
	}
	return n
}

// runs joins slots to runs.
type runs struct {
	run   slotRun
	yield func(store.Slot, int) bool
}

// add reports whether to go on.
func (r *runs) add(s store.Slot, n int) bool {
	if r.run.n > 0 && r.run.slot+store.Slot(r.run.n) == s {
		r.run.n += n
		return true
	}
	ok := r.end()
	r.run = slotRun{s, n}
	return ok
}

// end tells the last run.
func (r *runs) end() bool { return r.run.n == 0 || r.yield(r.run.slot, r.run.n) }

// used tells all slots that the maps name, each once, and counts their shares. Only maps of one page size share a slot, and only for the same page of
// the object: any other slot that is named twice is told twice, and the store finds that its contents cannot be right. From New.
func (p *Pager) used(yield func(store.Slot, int) bool) {
	sizes := make(map[int64][]*object)
	for _, o := range p.ids {
		if o != nil {
			sizes[o.pageSize] = append(sizes[o.pageSize], o)
		}
	}
	r := &runs{yield: yield}
	for _, objects := range sizes {
		slices.SortFunc(objects, func(a, b *object) int { return cmp.Compare(len(b.counts), len(a.counts)) }) // longest first
		if !p.usedOf(objects, r) {
			return
		}
	}
	r.end()
}

// name is that a map names a slot.
type name struct {
	slot store.Slot
	o    *object
}

// usedOf is used for objects of one page size, sorted by the length of their maps.
func (p *Pager) usedOf(objects []*object, r *runs) bool {
	var here []*object // that have anything in this chunk
	var names []name   // of one page
	for c := 0; ; c++ {
		for len(objects) > 0 && c >= len(objects[len(objects)-1].counts) {
			objects = objects[:len(objects)-1]
		}
		if len(objects) == 0 {
			return true
		}
		here = here[:0]
		for _, o := range objects {
			if o.counts[c] != 0 {
				here = append(here, o)
			}
		}
		if len(here) == 1 {
			if !here[0].chunkSlots(c, r) {
				return false
			}
			continue
		}
		for i := c * chunkPages; i < (c+1)*chunkPages && len(here) > 0; i++ {
			names = names[:0]
			for _, o := range here {
				if w := o.word(int64(i)); w != 0 {
					names = append(names, name{wordSlot(w), o})
				}
			}
			slices.SortFunc(names, func(a, b name) int { return cmp.Compare(a.slot, b.slot) })
			for len(names) > 0 {
				n := 1
				for n < len(names) && names[n].slot == names[0].slot {
					n++
				}
				if n > 1 {
					p.shares.set(names[0].slot, n)
					for _, x := range names[:n] {
						x.o.shared.Store(true)
					}
				}
				if !r.add(names[0].slot, names[0].o.unit) {
					return false
				}
				names = names[n:]
			}
		}
	}
}

// slots tells all slots that the map names, in runs. Nobody else uses the object.
func (o *object) slots(yield func(store.Slot, int) bool) {
	r := &runs{yield: yield}
	for c, count := range o.counts {
		if count != 0 && !o.chunkSlots(c, r) {
			return
		}
	}
	r.end()
}

func (o *object) chunkSlots(c int, r *runs) bool {
	words := o.chunk(c)
	for i := range words {
		if w := words[i].Load(); w != 0 && !r.add(wordSlot(w), o.unit) {
			return false
		}
	}
	return true
}

// chunk is a chunk of the map. Called with mu.
func (o *object) chunk(c int) []atomic.Uint64 {
	return o.words[c*chunkPages : min((c+1)*chunkPages, len(o.words))]
}
