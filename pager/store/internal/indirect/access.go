package indirect

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/store"
)

// access is one operation in progress, in as many pieces as it has contiguous places.
type access struct {
	s      *Store
	op     *store.Op
	epoch  uint32
	turn   uint32 // of a write
	left   atomic.Int32
	mu     sync.Mutex
	pieces []*piece // guarded by mu until left is 0; of a write: those that are, or will be, stored
	good   int      // guarded by mu until left is 0; slots before the first bad one
	err    error    // guarded by mu until left is 0; of that one
}

// piece is an operation on a part.
type piece struct {
	op    store.Op
	a     *access
	p     *Part
	first int // of the access's slots
	n     int
	try   int  // of a write: how many parts were tried before
	again bool // of a read: all touched before
}

var (
	accesses = sync.Pool{New: func() any { return new(access) }}
	pieces   = sync.Pool{New: func() any {
		c := new(piece)
		c.op.Arg = c
		return c
	}}
)

// check is what Read and Write ask first. If there is no error the operation has begun.
func (s *Store) check(op *store.Op) error {
	switch {
	case len(op.Data) == 0 || len(op.Data)%store.SlotSize != 0:
		return fmt.Errorf("access slot %d: %d bytes are no whole number of slots: %w", op.Slot, len(op.Data), unix.EINVAL)
	case op.Slot == store.None || op.Slot > store.MaxSlot || !s.reaches(op.Slot+store.Slot(op.Slots())-1):
		return fmt.Errorf("access slot %d: beyond the store: %w", op.Slot, unix.EINVAL)
	case !s.begin():
		return fmt.Errorf("access slot %d: %w", op.Slot, store.ErrClosed)
	}
	return nil
}

func (s *Store) access(op *store.Op) *access {
	a := accesses.Get().(*access)
	a.s, a.op, a.epoch, a.good, a.err = s, op, s.enter(), op.Slots(), nil
	a.left.Store(1)
	return a
}

func (a *access) piece(p *Part, slot store.Slot, first, n int) *piece {
	c := pieces.Get().(*piece)
	c.a, c.p, c.first, c.n = a, p, first, n
	c.op.Slot, c.op.Prefetch = slot, a.op.Prefetch
	c.op.Data = a.op.Data[first*store.SlotSize : (first+n)*store.SlotSize]
	return c
}

func (c *piece) put() {
	c.op.Data, c.a, c.p = nil, nil, nil
	pieces.Put(c)
}

// fail notes that slot i of the access is bad.
func (a *access) fail(i int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if i < a.good || a.err == nil {
		a.good, a.err = min(i, a.good), err
	}
}

func (a *access) failed() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err != nil
}

// finish ends an access whose pieces are done.
func (a *access) finish() {
	s, op, good, err, epoch := a.s, a.op, a.good, a.err, a.epoch
	for i := range a.pieces {
		a.pieces[i] = nil
	}
	a.s, a.op, a.err, a.pieces = nil, nil, nil, a.pieces[:0]
	accesses.Put(a)
	s.leave(epoch)
	op.Finish(good, err)
	s.end()
}

// Read reads from wherever the contents are.
func (s *Store) Read(op *store.Op) {
	if err := s.check(op); err != nil {
		op.Finish(0, err)
		return
	}
	a := s.access(op)
	n := op.Slots()
	for i := 0; i < n && !a.failed(); {
		w := s.touch(op.Slot + store.Slot(i))
		id, slot, again := w.part(), w.slot(), w&touched != 0
		if id == 0 || id == uint8(lost) {
			a.fail(i, fmt.Errorf("read slot %d: never written, or lost: %w", op.Slot+store.Slot(i), store.ErrCorrupt))
			break
		}
		p := s.parts[id].Load()
		if p == nil {
			a.fail(i, fmt.Errorf("read slot %d: its word names part %d, which is not there: %w", op.Slot+store.Slot(i), id, store.ErrCorrupt))
			break
		}
		end := i + 1
		for end < n {
			at := op.Slot + store.Slot(end)
			w := word(s.word(at).Load())
			if w.part() != id || w.slot() != slot+store.Slot(end-i) {
				break
			}
			if again = again && w&touched != 0; w&(touched|moving) == 0 {
				s.word(at).CompareAndSwap(uint64(w), uint64(w|touched))
			}
			end++
		}
		c := a.piece(p, slot, i, end-i)
		c.again, c.op.Done = again, readDone
		a.left.Add(1)
		p.Read(&c.op)
		i = end
	}
	a.readDone()
}

// touch marks a slot as read, and tells its word of before.
func (s *Store) touch(slot store.Slot) word {
	p := s.word(slot)
	w := word(p.Load())
	if w != 0 && w != lost && w&(touched|moving) == 0 {
		p.CompareAndSwap(uint64(w), uint64(w|touched))
	}
	return w
}

func readDone(op *store.Op) {
	c := op.Arg.(*piece)
	a := c.a
	c.p.count(op, false)
	switch {
	case op.Err != nil:
		a.fail(c.first+op.Good, op.Err)
	case c.again && a.s.again != nil:
		a.s.again(c.p, a.op.Slot+store.Slot(c.first), c.n)
	}
	c.put()
	a.readDone()
}

func (a *access) readDone() {
	if a.left.Add(-1) == 0 {
		a.finish()
	}
}

// Write writes to the parts in their order. What one has no room for, or fails to write, goes to the next.
func (s *Store) Write(op *store.Op) {
	if err := s.check(op); err != nil {
		op.Finish(0, err)
		return
	}
	a := s.access(op)
	a.turn = s.turn.Add(1)
	a.place(0, op.Slots(), 0, nil)
	a.writeDone()
}

// place writes n of the access's slots, from first on, to the first part from try on that takes them. err is why those before did not.
func (a *access) place(first, n, try int, err error) {
	for n > 0 {
		p, anyway := a.s.pick(try, a.turn)
		if p == nil {
			if err == nil {
				err = fmt.Errorf("write slot %d: no paging file: %w", a.op.Slot, store.ErrNoSpace)
			}
			a.fail(first, err)
			return
		}
		if anyway && p.Admit == nil || !anyway && p.Admit != nil && !p.Admit() {
			try++
			continue
		}
		slot, m, failed := p.alloc(n)
		if failed != nil {
			err = worse(err, failed)
			try++
			continue
		}
		c := a.piece(p, slot, first, m)
		c.try, c.op.Done = try, writeDone
		a.left.Add(1)
		p.Write(&c.op)
		first, n = first+m, n-m
	}
}

// worse is the error to tell of two: a failure rather than a lack of space, because that is what somebody must look after.
func worse(a, b error) error {
	if a == nil || errors.Is(a, store.ErrNoSpace) && !errors.Is(b, store.ErrNoSpace) {
		return b
	}
	return a
}

func writeDone(op *store.Op) {
	c := op.Arg.(*piece)
	a := c.a
	c.p.count(op, true)
	if op.Err != nil {
		first, n, try, err := c.first, c.n, c.try, op.Err
		c.p.free(op.Slot, n)
		c.put()
		a.place(first, n, try+1, err)
	} else {
		a.mu.Lock()
		a.pieces = append(a.pieces, c)
		a.mu.Unlock()
	}
	a.writeDone()
}

// writeDone commits when the last piece is there: all of it or nothing.
func (a *access) writeDone() {
	if a.left.Add(-1) > 0 {
		return
	}
	s := a.s
	failpoint.Here("indirect.stored")
	var old places
	for _, c := range a.pieces {
		if a.err != nil {
			c.p.free(c.op.Slot, c.n)
			c.put()
			continue
		}
		for i := range store.Slot(c.n) {
			w := place(c.p, c.op.Slot+i) | touched
			old.add(s, word(s.word(a.op.Slot+store.Slot(c.first)+i).Swap(uint64(w))))
			failpoint.Here("indirect.word")
		}
		c.put()
	}
	failpoint.Here("indirect.committed")
	old.flush(s)
	a.finish()
}
