package indirect

import (
	"context"
	"errors"
	"fmt"
	"time"

	"machpager/internal/failpoint"
	"machpager/pager/store"
)

// mover is what moving a batch needs, kept from batch to batch.
type mover struct {
	buf    []byte // batchSlots slots
	slots  []store.Slot
	old    []word // by slots: the word before it was marked
	ok     []bool // by slots: read and right
	ops    []*store.Op
	done   chan struct{}
	target []moved
}

// moved is a run of the batch at its new place.
type moved struct {
	first, n int
	p        *Part
	slot     store.Slot
	err      error
}

// Cool takes the touched mark from the slots of p from slot on, and appends those that had none to cold, until it has 512. It
// returns where it stopped, and whether that is behind the last.
func (s *Store) Cool(p *Part, slot store.Slot, cold []store.Slot) (next store.Slot, all []store.Slot, end bool) {
	if !s.begin() {
		return slot, cold, true
	}
	defer s.end()
	words := *s.words.Load()
	for ; int(slot) <= len(words) && len(cold) < batchSlots; slot++ {
		w := word(words[slot-1].Load())
		switch {
		case w.part() != p.ID || w&moving != 0:
		case w&touched != 0:
			words[slot-1].CompareAndSwap(uint64(w), uint64(w&^touched))
		default:
			cold = append(cold, slot)
		}
	}
	return slot, cold, int(slot) > len(words)
}

// Move moves those of the slots, at most 512, that are in from, to the part that to gives (tried so often before; nil: no other). It returns how many it moved,
// and the first error if it was not all.
// What cannot be moved stays, and is whole. A slot that from calls corrupt stays too; with drop it is lost, and counts as moved.
func (s *Store) Move(slots []store.Slot, from *Part, to func(try int) *Part, drop bool) (n int, err error) {
	s.moveMu.Lock()
	defer s.moveMu.Unlock()
	if s.state.Load() >= closedState {
		return 0, fmt.Errorf("move contents: %w", store.ErrClosed)
	}
	m := &s.mover
	m.init()
	for _, slot := range slots {
		p := s.word(slot)
		if w := word(p.Load()); w.part() == from.ID && w&moving == 0 && p.CompareAndSwap(uint64(w), uint64(w|moving)) {
			m.slots, m.old, m.ok = append(m.slots, slot), append(m.old, w), append(m.ok, false)
		}
	}
	failpoint.Here("indirect.marked")
	var dropped int
	dropped, err = m.read(s, from, drop)
	werr := m.write(to)
	failpoint.Here("indirect.copied")
	if err == nil {
		err = werr
	}
	n = m.commit(s, from) + dropped
	return n, err
}

func (m *mover) init() {
	if m.buf == nil {
		m.buf = make([]byte, batchSlots*store.SlotSize)
		m.done = make(chan struct{}, batchSlots)
	}
	m.slots, m.old, m.ok, m.target = m.slots[:0], m.old[:0], m.ok[:0], m.target[:0]
}

func (m *mover) data(first, n int) []byte {
	return m.buf[first*store.SlotSize : (first+n)*store.SlotSize]
}

// op is operation number i.
func (m *mover) op(i int) *store.Op {
	for len(m.ops) <= i {
		m.ops = append(m.ops, &store.Op{Prefetch: true, Done: func(*store.Op) { m.done <- struct{}{} }})
	}
	return m.ops[i]
}

// read reads the batch; ok tells what was right. Corrupt slots are dropped, or left where they are.
func (m *mover) read(s *Store, from *Part, drop bool) (dropped int, err error) {
	for i := 0; i < len(m.slots); {
		n := 0
		var firsts [batchSlots]int
		for ; i < len(m.slots); n++ { // all at once
			end := i + 1
			for end < len(m.slots) && m.old[end].slot() == m.old[i].slot()+store.Slot(end-i) {
				end++
			}
			op := m.op(n)
			op.Slot, op.Data = m.old[i].slot(), m.data(i, end-i)
			firsts[n] = i
			from.Read(op)
			i = end
		}
		for range n {
			<-m.done
		}
		for k := range n {
			op, first := m.op(k), firsts[k]
			size := op.Slots()
			for op.Err != nil {
				from.count(op, false)
				m.right(first, op.Good)
				bad := first + op.Good
				if err == nil {
					err = fmt.Errorf("move contents: %w", op.Err)
				}
				if !errors.Is(op.Err, store.ErrCorrupt) {
					size = 0
					break
				}
				if drop && s.word(m.slots[bad]).CompareAndSwap(uint64(m.old[bad]|moving), uint64(lost)) {
					from.free(m.old[bad].slot(), 1)
					m.old[bad] = lost
					dropped++
				}
				size -= op.Good + 1
				if first = bad + 1; size == 0 {
					break
				}
				op.Slot, op.Data = m.old[first].slot(), m.data(first, size)
				from.Read(op)
				<-m.done
			}
			if op.Err == nil {
				from.count(op, false)
				m.right(first, size)
			}
		}
	}
	if dropped > 0 && errors.Is(err, store.ErrCorrupt) {
		err = nil
	}
	return dropped, err
}

func (m *mover) right(first, n int) {
	for i := range n {
		m.ok[first+i] = true
	}
}

// write writes what was read, in as few runs as the parts give.
func (m *mover) write(to func(try int) *Part) (err error) {
	n := 0
	for i := 0; i < len(m.slots); {
		if !m.ok[i] {
			i++
			continue
		}
		end := i + 1
		for end < len(m.slots) && m.ok[end] {
			end++
		}
		var why error
		for try := 0; i < end; {
			p := to(try)
			if p == nil {
				if why == nil {
					why = fmt.Errorf("there is nowhere else: %w", store.ErrNoSpace)
				}
				err = worse(err, why)
				i = end
				break
			}
			slot, got, e := p.alloc(end - i)
			if e != nil {
				why = worse(why, e)
				try++
				continue
			}
			op := m.op(n)
			n++
			op.Slot, op.Data = slot, m.data(i, got)
			m.target = append(m.target, moved{first: i, n: got, p: p, slot: slot})
			p.Write(op)
			i += got
		}
	}
	for range n {
		<-m.done
	}
	for k := range n {
		op, t := m.op(k), &m.target[k]
		t.p.count(op, true)
		if t.err = op.Err; t.err != nil {
			err = worse(err, t.err)
		}
		op.Data = nil
	}
	if err != nil {
		err = fmt.Errorf("move contents: %w", err)
	}
	return err
}

// commit swaps the words of what was written, takes the mark from the others, and frees the old places when nobody reads there any more.
func (m *mover) commit(s *Store, from *Part) (n int) {
	for k := range m.target {
		t := &m.target[k]
		if t.err != nil {
			t.p.free(t.slot, t.n)
			continue
		}
		for i := range t.n {
			at := t.first + i
			if s.word(m.slots[at]).CompareAndSwap(uint64(m.old[at]|moving), uint64(place(t.p, t.slot+store.Slot(i)))) {
				n++
				failpoint.Here("indirect.swapped")
				continue
			}
			t.p.free(t.slot+store.Slot(i), 1) // the slot was freed meanwhile; the old place is ours
		}
		for i := range t.n {
			m.ok[t.first+i] = false // no mark to take away
			m.old[t.first+i] |= moving
		}
	}
	for i, w := range m.old {
		if w == lost || w&moving != 0 {
			continue
		}
		if s.word(m.slots[i]).CompareAndSwap(uint64(w|moving), uint64(w)) {
			m.old[i] = lost // it stays
		}
	}
	if n > 0 {
		s.drain()
	}
	var run places
	for _, w := range m.old {
		if w != lost {
			run.add(s, w&^moving)
		}
	}
	failpoint.Here("indirect.drained")
	run.flush(s)
	failpoint.Here("indirect.vacated")
	return n
}

// empty moves everything out of p.
func (s *Store) empty(ctx context.Context, p *Part) error {
	to := func(try int) *Part {
		if q, again := s.pick(try, 0); !again {
			return q
		}
		return nil
	}
	batch := make([]store.Slot, 0, batchSlots)
	for p.Used() > 0 {
		found := false
		for slot, end := store.Slot(1), false; !end; {
			if err := context.Cause(ctx); err != nil {
				return fmt.Errorf("move contents of part %d: %w", p.ID, err)
			}
			if slot, batch, end = s.in(p, slot, batch[:0]); len(batch) == 0 {
				continue
			}
			found = true
			if _, err := s.Move(batch, p, to, true); err != nil {
				return fmt.Errorf("move contents of part %d: %w", p.ID, err)
			}
		}
		if !found { // somebody is just about to free the rest
			select {
			case <-ctx.Done():
			case <-s.closed:
				return store.ErrClosed
			case <-time.After(time.Millisecond):
			}
		}
	}
	return nil
}

// in is the slots of p from slot on, up to a batch of them.
func (s *Store) in(p *Part, slot store.Slot, batch []store.Slot) (next store.Slot, slots []store.Slot, end bool) {
	if !s.begin() {
		return slot, batch, true
	}
	defer s.end()
	words := *s.words.Load()
	for ; int(slot) <= len(words) && len(batch) < batchSlots; slot++ {
		if word(words[slot-1].Load()).part() == p.ID {
			batch = append(batch, slot)
		}
	}
	return slot, batch, int(slot) > len(words)
}
