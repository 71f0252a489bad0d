// Package indirect is a store whose slots are places in other stores, its parts. A slot keeps its number while its contents are moved from part to
// part. It is what store/tiered and store/files have in common; they decide where contents go and when they move.
//
// # Words
//
// There is one word for each slot, in a memory that may outlive the process: the part's number in bits 0-7 (0: never written), the part's slot in bits 8-48, and
// two flags, touched (read or written lately) and moving. New contents are in the part before the word is stored, with one store or compare-and-swap; what the old
// word named is freed after. So the words are valid at every instant; Rebuild clears the flags and tells the parts what is used.
//
// # Moving
//
// There is one mover at a time. It marks words as moving, reads, writes to the other part, and swaps the words. Who frees a slot that is marked leaves what the word
// named to the mover, which notices when its swap fails.
//
// Operations enter an epoch, which is 0 or 1, and leave it at their end. After its swaps the mover makes the other epoch the current one and waits until nobody is left in the
// old one: then nobody reads at the old places, and they are freed. Operations never wait for the mover.
//
// # Locks
//
//	moveMu (moving, rebuilding)
//	growMu (growing the words), access.mu: leaves
//
// None but moveMu is held while a part is called.
package indirect

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/store"
)

// Options of a Store.
type Options struct {
	// Words is the memory of the words. It becomes the store's. nil: anonymous memory, which ends with the process.
	Words store.Memory
	// Capacity is how many bytes of contents may be stored, rounded down to slots. 0: what the parts have.
	Capacity int64
	// Again is called after a read of slots in p that were all read or written before and not cooled since. It must not block. nil: nothing
	Again func(p *Part, slot store.Slot, n int)
}

// Part is one of the stores behind it.
type Part struct {
	store.Store             // immutable
	ID          uint8       // immutable
	Admit       func() bool // immutable; whether to write there now if others can. nil: always
	used        atomic.Int64
	counts      [4]atomic.Int64 // see Counters
}

// Counters are slots, since the part was added.
type Counters struct {
	In, Out             int64 // read and written
	InFailed, OutFailed int64
}

// Counters tells what went in and out.
func (p *Part) Counters() Counters {
	return Counters{In: p.counts[0].Load(), Out: p.counts[1].Load(), InFailed: p.counts[2].Load(), OutFailed: p.counts[3].Load()}
}

// Used is how many slots of the part are allocated.
func (p *Part) Used() int64 { return p.used.Load() }

func (p *Part) count(op *store.Op, write bool) {
	k := 0
	if write {
		k = 1
	}
	good := op.Slots()
	if op.Err != nil {
		p.counts[k+2].Add(1)
		good = op.Good
	}
	p.counts[k].Add(int64(good))
}

func (p *Part) alloc(n int) (store.Slot, int, error) {
	slot, n, err := p.Alloc(n, 1)
	if err == nil {
		p.used.Add(int64(n))
	}
	return slot, n, err
}

func (p *Part) free(slot store.Slot, n int) {
	p.Free(slot, n)
	p.used.Add(int64(-n))
}

// word is where a slot's contents are.
type word uint64

const (
	touched = word(1) << 62
	moving  = word(1) << 63
	lost    = word(0xff) // the part said that it was corrupt, and is gone

	maxParts    = 0xfe
	pageSlots   = store.SlotSize / 8
	wordsSlack  = 1 << 16 // free slots that keep their words' memory
	batchSlots  = 512     // moved at once
	closedState = int64(1) << 62
)

func place(p *Part, s store.Slot) word { return word(s)<<8 | word(p.ID) }
func (w word) part() uint8             { return uint8(w) }
func (w word) slot() store.Slot        { return store.Slot(w >> 8 & (1<<41 - 1)) }

// Store is a store over parts.
type Store struct {
	mem     store.Memory
	book    *store.Allocator
	bounded bool                                  // immutable
	again   func(p *Part, slot store.Slot, n int) // immutable
	parts   [maxParts + 1]atomic.Pointer[Part]    // by number
	order   atomic.Pointer[[][]*Part]             // where to write: groups by rank; in a group in turn
	turn    atomic.Uint32                         // counts writes
	growMu  sync.Mutex                            // growing mem
	words   atomic.Pointer[[]atomic.Uint64]       // all of mem; replaced under growMu
	state   atomic.Int64                          // operations under way, and closedState
	idle    chan struct{}                         // closed when closed and nothing is under way
	epoch   atomic.Uint32                         // bit 0
	inside  [2]struct {
		n atomic.Int64
		_ [56]byte
	}
	draining atomic.Bool
	drained  chan struct{} // capacity 1

	moveMu   sync.Mutex
	mover    mover // guarded by moveMu
	closed   chan struct{}
	closeMu  sync.Mutex
	finished bool  // guarded by closeMu
	err      error // guarded by closeMu
}

// New makes a store without parts.
func New(o Options) (*Store, error) {
	if o.Capacity < 0 || o.Capacity > 0 && o.Capacity < store.SlotSize {
		return nil, fmt.Errorf("make store: capacity of %d bytes: need at least one slot of %d: %w", o.Capacity, store.SlotSize, unix.EINVAL)
	}
	mem := o.Words
	if mem == nil {
		var err error
		if mem, err = store.NewAnonymous(0); err != nil {
			return nil, fmt.Errorf("make store: words: %w", err)
		}
	}
	s := &Store{mem: mem, book: store.NewAllocator(uint64(o.Capacity / store.SlotSize)), bounded: o.Capacity > 0, again: o.Again}
	s.idle, s.drained, s.closed = make(chan struct{}), make(chan struct{}, 1), make(chan struct{})
	s.order.Store(new([][]*Part))
	w := mem.Words()
	s.words.Store(&w)
	return s, nil
}

// Add makes st the part of this number, 1 to 254. Nothing is written to it before SetOrder.
func (s *Store) Add(id uint8, st store.Store, admit func() bool) (*Part, error) {
	p := &Part{Store: st, ID: id, Admit: admit}
	if id == 0 || id > maxParts || !s.parts[id].CompareAndSwap(nil, p) {
		return nil, fmt.Errorf("add part %d: taken, or not 1 to %d: %w", id, maxParts, unix.EINVAL)
	}
	return p, nil
}

// SetOrder says where to write: to a part of the first group, in turn, if it has room; else to the others of the group, and then to those of the next.
func (s *Store) SetOrder(groups [][]*Part) { s.order.Store(&groups) }

// pick is the part to try after so many others, or nil. In a second round come those again that may not have admitted it.
func (s *Store) pick(try int, turn uint32) (p *Part, anyway bool) {
	order := *s.order.Load()
	for range 2 {
		for _, g := range order {
			if try < len(g) {
				return g[(int(turn)+try)%len(g)], anyway
			}
			try -= len(g)
		}
		anyway = true
	}
	return nil, true
}

// begin starts an operation. It fails when the store is closed.
func (s *Store) begin() bool {
	if s.state.Add(1) < closedState {
		return true
	}
	s.end()
	return false
}

func (s *Store) end() {
	if s.state.Add(-1) == closedState {
		s.closeMu.Lock()
		defer s.closeMu.Unlock()
		select {
		case <-s.idle:
		default:
			close(s.idle)
		}
	}
}

// enter makes the caller one of the current epoch.
func (s *Store) enter() (epoch uint32) {
	for {
		e := s.epoch.Load() & 1
		s.inside[e].n.Add(1)
		if s.epoch.Load()&1 == e {
			return e
		}
		s.leave(e)
	}
}

func (s *Store) leave(e uint32) {
	if s.inside[e].n.Add(-1) == 0 && s.draining.Load() {
		select {
		case s.drained <- struct{}{}:
		default:
		}
	}
}

// drain waits until all operations have ended that may have seen the words of before. Called with moveMu.
func (s *Store) drain() {
	old := s.epoch.Load() & 1
	s.draining.Store(true)
	s.epoch.Store(1 - old)
	for s.inside[old].n.Load() > 0 {
		<-s.drained
	}
	s.draining.Store(false)
	select {
	case <-s.drained:
	default:
	}
}

// Alloc takes slots. Where their contents go is decided when they are written.
func (s *Store) Alloc(n, unit int) (store.Slot, int, error) {
	if s.state.Load() >= closedState {
		return store.None, 0, fmt.Errorf("allocate %d slots: %w", n, store.ErrClosed)
	}
	return s.book.AllocReaching(n, unit, s.reach)
}

func (s *Store) reaches(slot store.Slot) bool { return int64(slot) <= int64(len(*s.words.Load())) }

func (s *Store) reach(last store.Slot) error {
	if s.reaches(last) {
		return nil
	}
	s.growMu.Lock()
	defer s.growMu.Unlock()
	groups := int64(last-1)/store.GroupSlots + 1
	if err := s.mem.Grow(groups * store.GroupSlots * 8); err != nil {
		return err
	}
	w := s.mem.Words()
	s.words.Store(&w)
	return nil
}

func (s *Store) word(slot store.Slot) *atomic.Uint64 { return &(*s.words.Load())[slot-1] }

// Free gives slots back, and their places.
func (s *Store) Free(slot store.Slot, n int) {
	if !s.begin() {
		return
	}
	defer s.end()
	var run places
	for i := range store.Slot(n) {
		run.add(s, word(s.word(slot+i).Swap(0)))
		failpoint.Here("indirect.cleared")
	}
	run.flush(s)
	failpoint.Here("indirect.freed")
	s.book.Free(slot, n, true)
	if _, _, backed := s.book.Counts(); backed > wordsSlack {
		s.book.Trim(wordsSlack/2, s.discard) // an error leaves the memory where it is
	}
}

// discard gives the pages back in which only words of the run are, all of them 0.
func (s *Store) discard(slot store.Slot, n int) error {
	first := (int64(slot-1) + pageSlots - 1) / pageSlots
	end := (int64(slot-1) + int64(n)) / pageSlots
	if first >= end {
		return nil
	}
	defer failpoint.Here("indirect.discarded")
	return s.mem.Discard(first*store.SlotSize, (end-first)*store.SlotSize)
}

// places collects places to be freed into runs.
type places struct {
	part uint8
	slot store.Slot
	n    int
}

// add adds what a word named when it was taken from its slot. What is moving is the mover's.
func (r *places) add(s *Store, w word) {
	if w.part() == 0 || w.part() == uint8(lost) || w&moving != 0 {
		return
	}
	if r.n > 0 && w.part() == r.part && w.slot() == r.slot+store.Slot(r.n) {
		r.n++
		return
	}
	r.flush(s)
	r.part, r.slot, r.n = w.part(), w.slot(), 1
}

func (r *places) flush(s *Store) {
	if r.n > 0 {
		s.parts[r.part].Load().free(r.slot, r.n)
	}
	r.n = 0
}

// View lends nothing: contents may move.
func (s *Store) View(store.Slot, int) ([]byte, error) { return nil, nil }

// Info adds the parts up.
func (s *Store) Info() store.Info {
	capacity, used, _ := s.book.Counts()
	i := store.Info{Used: int64(used) * store.SlotSize}
	for _, g := range *s.order.Load() {
		for _, p := range g {
			i.Free += p.Info().Free
		}
	}
	if s.bounded {
		i.Free = min(i.Free, int64(capacity)*store.SlotSize-i.Used)
	}
	i.Free = max(i.Free, 0) &^ (store.SlotSize - 1)
	i.Total = i.Used + i.Free
	return i
}

// Rebuild takes over the words of an earlier store, and has the parts rebuild. All parts that it had must have been added.
func (s *Store) Rebuild(used iter.Seq2[store.Slot, int]) error {
	s.moveMu.Lock()
	defer s.moveMu.Unlock()
	words := *s.words.Load()
	kept, err := s.book.ResetKept(len(words), used)
	if err != nil {
		return err
	}
	var counts [maxParts + 2]int64
	s.each(func(i int, w word) {
		if !kept.Has(i) {
			words[i].Store(0)
			return
		}
		words[i].Store(uint64(w &^ (touched | moving)))
		counts[w.part()]++
	})
	for id, n := range counts[:maxParts+1] {
		p := s.parts[id].Load()
		if p == nil {
			if n > 0 && id > 0 {
				err = errors.Join(err, fmt.Errorf("rebuild: part %d is missing, and has %d slots: %w", id, n, unix.ENOENT))
			}
			continue
		}
		p.used.Store(n)
		rebuilt := p.Rebuild(func(yield func(store.Slot, int) bool) {
			run, more := places{}, true
			s.each(func(_ int, w word) {
				switch {
				case !more || int(w.part()) != id:
				case run.n > 0 && w.slot() == run.slot+store.Slot(run.n):
					run.n++
				default:
					more = run.n == 0 || yield(run.slot, run.n)
					run.slot, run.n = w.slot(), 1
				}
			})
			if more && run.n > 0 {
				yield(run.slot, run.n)
			}
		})
		if rebuilt != nil {
			err = errors.Join(err, fmt.Errorf("rebuild part %d: %w", id, rebuilt))
		}
	}
	return err
}

// sparse is implemented by memory that knows where it may hold anything but zeros.
type sparse interface {
	Data(fn func(off, n int64) bool)
}

// each tells the words that are not 0, by slot less one.
func (s *Store) each(f func(i int, w word)) {
	words := *s.words.Load()
	part := func(off, n int64) bool {
		for i := off / 8; i < (off+n)/8; i++ {
			if w := words[i].Load(); w != 0 {
				f(int(i), word(w))
			}
		}
		return true
	}
	if m, ok := s.mem.(sparse); ok {
		m.Data(part)
	} else {
		part(0, int64(len(words))*8)
	}
}

// Closed is closed when Close begins: who moves things must stop.
func (s *Store) Closed() <-chan struct{} { return s.closed }

// Close waits for what is under way, the mover's batch included, and closes the parts.
func (s *Store) Close() error {
	if s.state.Or(closedState)&closedState == 0 {
		close(s.closed)
		s.state.Add(1)
		s.end() // of nothing, if nothing is under way
	}
	<-s.idle
	s.moveMu.Lock()
	defer s.moveMu.Unlock()
	s.closeMu.Lock()
	defer s.closeMu.Unlock()
	if s.finished {
		return s.err
	}
	s.finished = true
	for i := range s.parts {
		if p := s.parts[i].Load(); p != nil {
			s.err = errors.Join(s.err, p.Close())
		}
	}
	s.err = errors.Join(s.err, s.mem.Close())
	return s.err
}

// Remove moves everything out of a part that no order names any more, and forgets it. With an error it is still there. The part is the caller's to close.
func (s *Store) Remove(ctx context.Context, p *Part) error {
	s.moveMu.Lock()
	s.drain() // writes that went by the old order
	s.moveMu.Unlock()
	if err := s.empty(ctx, p); err != nil {
		return err
	}
	s.moveMu.Lock()
	defer s.moveMu.Unlock()
	s.drain()
	s.parts[p.ID].Store(nil)
	return nil
}
