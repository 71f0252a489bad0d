package pager

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"

	"machpager/internal/failpoint"
	"machpager/pager/emm"
	"machpager/pager/store"
)

// DataReturn stores pages. ReturnCompleted tells whether all of them are stored: NoSpace if paging space is full, MemoryError if the store failed, InvalidArgument for
// a run beyond the object or of broken pages, InvalidObject if the object has ended.
func (p *Pager) DataReturn(h emm.Head, off int64, data []byte, _, _ bool) emm.KernReturn {
	return p.take(h.Control, off, data, false)
}

// DataInitialize stores pages as DataReturn does, but for those that are stored already. Of a page that was last returned as zeros nothing is
// known, so it counts as never written. In an object that an earlier pager left it is DataReturn: what is stored may be from an initialize whose answer
// the vm did not live to hear, and what it gives now is newer.
func (p *Pager) DataInitialize(h emm.Head, off int64, data []byte) emm.KernReturn {
	return p.take(h.Control, off, data, true)
}

// take begins a return, or has it wait for another. It is answered in any case, so the message is never refused.
func (p *Pager) take(control emm.Control, off int64, data []byte, initialize bool) emm.KernReturn {
	if control == nil {
		return emm.InvalidArgument
	}
	run := emm.Run{Off: off, Size: int64(len(data))}
	a := p.attached(control)
	if a == nil || !a.o.whole(run) || run.End() > a.o.size {
		control.ReturnCompleted(run, emm.InvalidArgument)
		return emm.Success // it is answered
	}
	o := a.o
	w := writes.Get().(*write)
	w.o, w.control, w.run, w.data, w.initialize = o, control, run, data, initialize && !o.adopted
	o.mu.Lock()
	if a.dead.Load() {
		o.mu.Unlock()
		w.put()
		control.ReturnCompleted(run, emm.InvalidArgument)
		return emm.Success
	}
	if o.blocked(run) {
		o.waiting = append(o.waiting, waiter{a: a, run: run, w: w})
		o.mu.Unlock()
		return emm.Success
	}
	w.begin()
	o.mu.Unlock()
	w.start()
	return emm.Success
}

// waiter is a message that waits for returns in progress: a request, or a return if w is set.
type waiter struct {
	a    *attachment
	run  emm.Run
	need int64
	w    *write
}

func overlap(a, b emm.Run) bool { return a.Off < b.End() && b.Off < a.End() }

// blocked reports whether a message about run must wait. Called with mu.
func (o *object) blocked(run emm.Run) bool {
	for _, w := range o.active {
		if overlap(w.run, run) {
			return true
		}
	}
	for i := range o.waiting {
		if overlap(o.waiting[i].run, run) {
			return true
		}
	}
	return false
}

// runnable takes the first waiter that need not wait any more. Called with mu.
func (o *object) runnable() (m waiter, ok bool) {
	waiting := o.waiting
	for i := range waiting {
		o.waiting = waiting[:i] // what came before
		if o.blocked(waiting[i].run) {
			continue
		}
		m = waiting[i]
		copy(waiting[i:], waiting[i+1:])
		waiting[len(waiting)-1] = waiter{}
		o.waiting = waiting[:len(waiting)-1]
		return m, true
	}
	o.waiting = waiting
	return m, false
}

// keep in place of a new word leaves the page as it is.
const keep = ^uint64(0)

// write stores the pages of one return: zeros as nothing, the rest in as few runs of new slots as the store gives.
type write struct {
	o          *object
	control    emm.Control
	run        emm.Run
	data       []byte // lent
	initialize bool

	words  []uint64 // by page: the new word of the map, or keep
	old    []bool   // by page, of an object with an account: it is stored already
	pieces []*wpiece
	more   int64 // slots that are taken besides those that take the place of others, as far as w.old tells
	freed  []slotRun
	left   atomic.Int32 // pieces not done, and one for start
	mu     sync.Mutex
	err    error // guarded by mu until left is 0; the first
}

type wpiece struct {
	op store.Op
	w  *write
}

var (
	writes  = sync.Pool{New: func() any { return new(write) }}
	wpieces = sync.Pool{New: func() any {
		c := new(wpiece)
		c.op.Arg = c
		return c
	}}
	zeros [4096]byte
)

// begin makes the write an active one. Called with object.mu; no other active write overlaps.
func (w *write) begin() {
	o := w.o
	o.active = append(o.active, w)
	w.err = o.reach(w.run.End() / o.pageSize)
	first := w.run.Off / o.pageSize
	for i := range w.run.Size / o.pageSize {
		word := uint64(0)
		if w.initialize && o.word(first+i) != 0 {
			word = keep
		}
		w.words = append(w.words, word)
		if o.account.Load() != nil {
			w.old = append(w.old, o.word(first+i) != 0)
		}
	}
}

// start gives the pages to the store.
func (w *write) start() {
	o := w.o
	w.left.Store(1)
	pages := len(w.words)
	for page := 0; page < pages && w.failure() == nil; {
		if !w.wanted(page) {
			page++
			continue
		}
		end := page + 1
		for end < pages && w.wanted(end) {
			end++
		}
		if !w.mayTake(page, end) {
			w.fail(errQuota)
			break
		}
		page = w.place(page, end)
	}
	if w.failure() == nil { // all have their slots
		o.p.step("pager.allocated")
		for _, c := range w.pieces {
			w.left.Add(1)
			o.p.store.Write(&c.op)
		}
	}
	w.done()
}

// mayTake reports whether the account of the object has room for what pages [page, end) and those before them need besides what they have.
func (w *write) mayTake(page, end int) bool {
	if len(w.old) == 0 {
		return true
	}
	for i := page; i < end; i++ {
		if !w.old[i] {
			w.old[i] = true // place may take a part only: what is counted is not counted again
			w.more += int64(w.o.unit)
		}
	}
	return w.o.account.Load().room(w.o.p, w.more)
}

// wanted reports whether there is anything to store of a page.
func (w *write) wanted(page int) bool {
	if w.words[page] == keep {
		return false
	}
	b := w.data[int64(page)*w.o.pageSize : int64(page+1)*w.o.pageSize]
	for len(b) > 0 {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return true
		}
		b = b[len(zeros):]
	}
	return false
}

// place allocates slots for the pages from page to end, and returns how far they reach.
func (w *write) place(page, end int) int {
	o := w.o
	slot, n, err := o.p.store.Alloc((end-page)*o.unit, o.unit)
	if err != nil {
		w.fail(err)
		return end
	}
	c := wpieces.Get().(*wpiece)
	c.w, c.op.Done = w, wpieceDone
	c.op.Slot, c.op.Data = slot, w.data[int64(page)*o.pageSize:][:n*store.SlotSize]
	w.pieces = append(w.pieces, c)
	for ; n > 0; n -= o.unit {
		w.words[page] = storedWord(slot)
		slot += store.Slot(o.unit)
		page++
	}
	return page
}

// noteSpace warns once when paging space is full, and again only after a sixteenth of it was free.
func (p *Pager) noteSpace(result emm.KernReturn) {
	full := result == emm.NoSpace
	if full == p.full.Load() || !full && result != emm.Success {
		return
	}
	i := p.store.Info()
	switch {
	case !full && i.Free < i.Total/16:
	case !p.full.CompareAndSwap(!full, full):
	case full:
		p.log.Warn("paging space is full: pages stay in memory (add paging space, or end objects)", "total", i.Total, "used", i.Used)
	default:
		p.log.Info("paging space has room again", "total", i.Total, "used", i.Used)
	}
}

func (w *write) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
}

func (w *write) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func wpieceDone(op *store.Op) {
	w := op.Arg.(*wpiece).w
	if op.Err != nil {
		w.fail(op.Err)
	}
	w.done()
}

// done ends the return when the last piece is stored: commits, frees what was replaced, gives the loan back and lets waiters go on.
func (w *write) done() {
	if w.left.Add(-1) > 0 {
		return
	}
	o := w.o
	result := emm.Success
	first := w.run.Off / o.pageSize
	o.p.step("pager.stored")
	o.mu.Lock()
	switch {
	case w.err != nil:
		result = kernReturn(w.err, emm.MemoryError)
	case o.gone:
		result = emm.InvalidObject
	}
	for i, word := range w.words {
		switch {
		case word == keep:
		case result == emm.Success:
			o.commit(first+int64(i), word)
			failpoint.Here("pager.word") // no step: the lock is held
		case word != 0:
			w.freed = appendSlots(w.freed, wordSlot(word), o.unit)
		}
	}
	w.freed = o.reap(w.freed)
	for i, x := range o.active {
		if x == w {
			last := len(o.active) - 1
			o.active[i], o.active[last] = o.active[last], nil
			o.active = o.active[:last]
			break
		}
	}
	release := o.releasable()
	o.mu.Unlock()

	if w.err != nil && result != emm.NoSpace && w.err != errQuota {
		o.p.logError("store returned pages", "object", o.id, "off", w.run.Off, "size", w.run.Size, "err", w.err)
	}
	o.p.step("pager.committed")
	o.free(w.freed)
	o.p.step("pager.freed")
	o.p.noteSpace(result)
	control, run := w.control, w.run
	w.put()
	control.ReturnCompleted(run, result)
	if release {
		go o.release()
		return
	}
	o.wake()
}

// wake lets those waiters go on that can.
func (o *object) wake() {
	for {
		o.mu.Lock()
		m, ok := o.runnable()
		switch {
		case !ok:
			o.mu.Unlock()
			return
		case m.w != nil:
			m.w.begin()
			o.mu.Unlock()
			m.w.start()
		default:
			m.a.answer(m.run, m.need, o.enter())
		}
	}
}

func (w *write) put() {
	for i, c := range w.pieces {
		c.op.Data, c.w = nil, nil
		wpieces.Put(c)
		w.pieces[i] = nil
	}
	w.o, w.control, w.data, w.err = nil, nil, nil, nil
	w.words, w.old, w.pieces, w.freed, w.more = w.words[:0], w.old[:0], w.pieces[:0], w.freed[:0], 0
	writes.Put(w)
}

// kernReturn is what an error tells the vm.
func kernReturn(err error, otherwise emm.KernReturn) emm.KernReturn {
	var kr emm.KernReturn
	switch {
	case errors.Is(err, store.ErrNoSpace):
		return emm.NoSpace
	case errors.As(err, &kr):
		return kr
	}
	return otherwise
}
