package pager

import (
	"errors"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"machpager/pager/emm"
	"machpager/pager/store"
)

// DataRequest answers for each page of want: DataSupply with what was returned last, DataUnavailable if nothing was, DataError(MemoryError) if the store fails or
// the page is beyond the object. What the store has in memory is answered before it returns.
func (p *Pager) DataRequest(h emm.Head, want emm.Run, need int64, _ emm.Prot) emm.KernReturn {
	a := p.attached(h.Control)
	if a == nil || !a.o.whole(want) {
		return emm.InvalidArgument
	}
	o := a.o
	o.mu.Lock()
	if a.dead.Load() {
		o.mu.Unlock()
		return emm.InvalidArgument
	}
	if o.blocked(want) {
		o.waiting = append(o.waiting, waiter{a: a, run: want, need: need})
		o.mu.Unlock()
		return emm.Success
	}
	a.answer(want, need, o.enter())
	return emm.Success
}

// answer answers a request. The caller has entered epoch, which ends here, and has object.mu, which is given up.
func (a *attachment) answer(want emm.Run, need int64, epoch int) {
	o := a.o
	for {
		x := o.extent(want)
		if x.kind == extentPieces {
			x.read = o.gather(a, x.run, need, epoch)
		}
		o.mu.Unlock()
		a.give(&x, need, epoch)
		want = emm.Run{Off: x.run.End(), Size: want.Size - x.run.Size}
		if want.Size == 0 {
			o.leave(epoch)
			return
		}
		o.mu.Lock()
	}
}

// extent is the beginning of a request that is answered in one way.
type extent struct {
	kind extentKind
	run  emm.Run
	slot store.Slot // extentSlots: the first
	read *read      // extentPieces
}

type extentKind uint8

const (
	extentNothing extentKind = iota // never written
	extentBeyond                    // beyond the object
	extentSlots                     // contiguous, to be lent
	extentPieces                    // to be read into a buffer
)

// extent finds the first extent of want. Called with mu.
func (o *object) extent(want emm.Run) extent {
	if want.Off >= o.size {
		return extent{kind: extentBeyond, run: want}
	}
	first := want.Off / o.pageSize
	last := min(want.End(), o.size) / o.pageSize
	x := extent{run: emm.Run{Off: want.Off}}
	w := o.word(first)
	if w == 0 {
		page := first + 1
		for page < last && o.word(page) == 0 {
			page++
		}
		x.run.Size = (page - first) * o.pageSize
		return x
	}
	last = min(last, first+max(maxTransfer/o.pageSize, 1))
	page := first + o.contiguous(first, last)
	if n := page - first; o.p.lends && (n*o.pageSize >= viewMin || page == last || o.word(page) == 0) {
		x.kind, x.slot, x.run.Size = extentSlots, wordSlot(w), n*o.pageSize
		return x
	}
	for page < last && o.word(page) != 0 {
		n := o.contiguous(page, last)
		if o.p.lends && n*o.pageSize >= viewMin {
			break
		}
		page += n
	}
	x.kind, x.run.Size = extentPieces, (page-first)*o.pageSize
	return x
}

// contiguous is how many pages from first on, before last, are stored in one run of slots. first is stored. Called with mu.
func (o *object) contiguous(first, last int64) int64 {
	slot := wordSlot(o.word(first))
	page := first + 1
	for page < last {
		slot += store.Slot(o.unit)
		if o.word(page) != storedWord(slot) {
			break
		}
		page++
	}
	return page - first
}

// give answers one extent, or has it read.
func (a *attachment) give(x *extent, need int64, epoch int) {
	o := a.o
	if x.kind == extentSlots {
		data, err := o.p.store.View(x.slot, int(x.run.Size/store.SlotSize))
		switch {
		case err != nil: // what is good, and the bad page; the rest is another extent
			good := int64(len(data)) / o.pageSize * o.pageSize
			o.p.readFailed(o, x.run.Off+good, err)
			x.run.Size = good + o.pageSize
			a.supply(x.run.Off, data[:good])
			a.fail(emm.Run{Off: x.run.Off + good, Size: o.pageSize})
			return
		case data != nil:
			a.supply(x.run.Off, data)
			return
		}
		x.kind = extentPieces // not lent this time
		o.mu.Lock()
		x.read = o.gather(a, x.run, need, epoch)
		o.mu.Unlock()
	}
	switch x.kind {
	case extentNothing:
		if !a.dead.Load() {
			a.control.DataUnavailable(x.run)
		}
	case extentBeyond:
		a.fail(x.run)
	case extentPieces:
		x.run = x.read.run
		x.read.start()
	}
}

func (a *attachment) supply(off int64, data []byte) {
	if len(data) > 0 && !a.dead.Load() {
		a.control.DataSupply(off, data, emm.ProtNone, false, false)
	}
}

func (a *attachment) fail(r emm.Run) {
	if !a.dead.Load() {
		a.control.DataError(r, emm.MemoryError)
	}
}

func (p *Pager) readFailed(o *object, off int64, err error) {
	p.logError("read page from paging space", "object", o.id, "off", off, "err", err)
}

// logError logs an error of the store, but not more than one a second: a store that fails fails for every page.
func (p *Pager) logError(msg string, args ...any) {
	now, last := time.Now().UnixNano(), p.logged.Load()
	if now-last < int64(time.Second) || !p.logged.CompareAndSwap(last, now) {
		p.unlogged.Add(1)
		return
	}
	p.log.Error(msg, append(args, "before", p.unlogged.Swap(0))...)
}

// maxPages is the most pages of a read: the smallest ones.
const maxPages = maxTransfer / MinPageSize

// maxFailures is after how many bad pages the rest of a piece is given up.
const maxFailures = 16

// read brings stored pages into one buffer, from as many pieces of the store as it takes, and supplies them together.
type read struct {
	a      *attachment
	run    emm.Run
	epoch  int
	buf    *buffer
	pieces []*piece
	left   atomic.Int32                 // pieces not done, and one for start
	bad    [maxPages / 64]atomic.Uint64 // pages that could not be read
}

// piece is a contiguous part of a read.
type piece struct {
	op     store.Op
	r      *read
	page   int // of op.Data in the read
	failed int // pages
}

var (
	reads  = sync.Pool{New: func() any { return new(read) }}
	pieces = sync.Pool{New: func() any {
		c := new(piece)
		c.op.Arg = c
		return c
	}}
)

// gather prepares the read of a run of stored pages. Called with mu; the caller has entered epoch, and so has the read.
// A page that is stored no more (its return has overtaken the request) ends the run.
func (o *object) gather(a *attachment, run emm.Run, need int64, epoch int) *read {
	r := reads.Get().(*read)
	r.a, r.run, r.epoch = a, run, epoch
	r.buf = getBuffer(int(run.Size))
	first, last := run.Off/o.pageSize, run.End()/o.pageSize
	for page := first; page < last; {
		if o.word(page) == 0 {
			r.run.Size = (page - first) * o.pageSize
			break
		}
		n := o.contiguous(page, last)
		c := pieces.Get().(*piece)
		c.r, c.page, c.failed = r, int(page-first), 0
		c.op.Slot = wordSlot(o.word(page))
		c.op.Data = r.buf.b[(page-first)*o.pageSize : (page-first+n)*o.pageSize]
		c.op.Prefetch, c.op.Done = need < 0, pieceDone
		r.pieces = append(r.pieces, c)
		page += n
	}
	o.readers[epoch]++
	return r
}

func (r *read) start() {
	s := r.a.o.p.store
	r.left.Store(int32(len(r.pieces)) + 1)
	for _, c := range r.pieces {
		s.Read(&c.op)
	}
	r.done()
}

func pieceDone(op *store.Op) {
	c := op.Arg.(*piece)
	r, o := c.r, c.r.a.o
	if op.Err != nil {
		page := op.Good / o.unit
		pages := len(op.Data) / int(o.pageSize)
		o.p.readFailed(o, r.run.Off+int64(c.page+page)*o.pageSize, op.Err)
		c.failed++
		again := page+1 < pages && c.failed < maxFailures && !errors.Is(op.Err, store.ErrClosed)
		for ; page < pages; page++ {
			r.bad[(c.page+page)/64].Or(1 << ((c.page + page) % 64))
			if again {
				break
			}
		}
		if again { // behind the bad page
			c.page += page + 1
			op.Slot += store.Slot((page + 1) * o.unit)
			op.Data = op.Data[int64(page+1)*o.pageSize:]
			o.p.store.Read(op)
			return
		}
	}
	op.Data, c.r = nil, nil
	pieces.Put(c)
	r.done()
}

// done supplies what was read when the last piece is there.
func (r *read) done() {
	if r.left.Add(-1) > 0 {
		return
	}
	a, o := r.a, r.a.o
	pages := int(r.run.Size / o.pageSize)
	for page := 0; page < pages; {
		bad := r.isBad(page)
		end := page + 1
		for end < pages && r.isBad(end) == bad {
			end++
		}
		off, size := int64(page)*o.pageSize, int64(end-page)*o.pageSize
		if bad {
			a.fail(emm.Run{Off: r.run.Off + off, Size: size})
		} else {
			a.supply(r.run.Off+off, r.buf.b[off:off+size])
		}
		page = end
	}
	epoch := r.epoch
	r.buf.put()
	for i := range r.bad {
		r.bad[i].Store(0)
	}
	clear(r.pieces)
	r.a, r.buf, r.pieces = nil, nil, r.pieces[:0]
	reads.Put(r)
	o.leave(epoch)
}

func (r *read) isBad(page int) bool { return r.bad[page/64].Load()>>(page%64)&1 != 0 }

// buffer is a pooled buffer of a power of two bytes.
type buffer struct {
	b     []byte
	class int
}

var buffers [32]sync.Pool

func getBuffer(n int) *buffer {
	class := bits.Len(uint(n - 1))
	if b, ok := buffers[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, 1<<class), class: class}
}

func (b *buffer) put() { buffers[b.class].Put(b) }
