// Package tiered is a store in two tiers: a fast one, compressed memory as a rule, in front of a slow one, a file.
//
// Contents are written to the fast tier while it has room, otherwise to the slow one at once. When less than a reserve of the fast tier is free, a
// goroutine moves what has not been read or written lately to the slow tier, in batches of at most 512 slots, until twice the reserve is free. Nobody waits for
// it. It goes round the slots in the order of their numbers, like the hand of a clock, and spares once what was touched since it last came
// by; so neighbours go together, and are neighbours in the file.
//
// A slot read from the slow tier for the second time between two visits of the hand is moved to the fast tier, if that has room beyond its reserve, and
// Options.Promote says so.
//
// A page that one tier fails to write goes to the other. The write fails if none takes it, and then nothing of it is stored.
//
// Slots keep their numbers when contents move: see package indirect for how, and for what makes it valid at every instant. A restarted pager gives New the same memory of
// words and two tiers on their old memories and files, and calls Rebuild.
package tiered

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/store"
	"machpager/pager/store/internal/indirect"
)

// Options of a tiered store. nil or zero values are the defaults.
type Options struct {
	// Fast and Slow are the tiers. Required. They become the store's; they must be empty, or those of the store that Words is of.
	Fast, Slow store.Store
	// Words is the memory of the words that say where each slot's contents are. It becomes the store's. nil: anonymous memory, which ends with the process.
	Words store.Memory
	// Capacity is how many bytes of contents may be stored, rounded down to slots. 0: what the tiers have.
	Capacity int64
	// Reserve is how many bytes of the fast tier are to be free; 0: an eighth of what is free in it now.
	Reserve int64
	// Promote has what is read again from the slow tier moved to the fast one. It pays if a read there takes longer than compressing: with a slow
	// tier of about 1 ms a read, Zipf reads took half the time; from a file in the page cache they took 1.6 times as long.
	Promote bool
	// Log gets failures to move. nil: discard.
	Log *slog.Logger
}

// Store is a store in two tiers.
type Store struct {
	*indirect.Store
	fast, slow *indirect.Part // immutable
	reserve    int64          // immutable; bytes
	promote    bool           // immutable
	log        *slog.Logger   // immutable
	kick       chan struct{}  // capacity 1: the fast tier may be short
	wanted     chan span      // read again from the slow tier
	work       sync.WaitGroup
	hand       store.Slot // the mover's

	demoted, promoted, failed atomic.Int64
}

// span is a run of slots.
type span struct {
	slot store.Slot
	n    int
}

var _ store.Store = (*Store)(nil)

// The parts' numbers, in words that outlive the process.
const (
	fastPart = 1
	slowPart = 2
)

const (
	batch      = 512 // slots moved at once
	retryFirst = 10 * time.Millisecond
	retryLast  = 5 * time.Second
)

// New makes a tiered store, or takes one over. With an error the tiers and the memory stay the caller's.
func New(o Options) (*Store, error) {
	if o.Fast == nil || o.Slow == nil || o.Reserve < 0 {
		return nil, fmt.Errorf("make tiered store: need two tiers and no negative reserve: %w", unix.EINVAL)
	}
	s := &Store{reserve: o.Reserve, promote: o.Promote, log: o.Log, kick: make(chan struct{}, 1), wanted: make(chan span, 64), hand: 1}
	if s.reserve == 0 {
		s.reserve = o.Fast.Info().Free / 8
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	options := indirect.Options{Words: o.Words, Capacity: o.Capacity}
	if o.Promote {
		options.Again = s.again
	}
	var err error
	if s.Store, err = indirect.New(options); err != nil {
		return nil, fmt.Errorf("make tiered store: %w", err)
	}
	if s.fast, err = s.Add(fastPart, o.Fast, func() bool { return s.room() >= s.reserve/8 }); err != nil {
		return nil, fmt.Errorf("make tiered store: %w", err)
	}
	if s.slow, err = s.Add(slowPart, o.Slow, nil); err != nil {
		return nil, fmt.Errorf("make tiered store: %w", err)
	}
	s.SetOrder([][]*indirect.Part{{s.fast}, {s.slow}})
	s.work.Go(s.mover)
	return s, nil
}

// Rebuild takes over what an earlier store left, and has the mover look at it.
func (s *Store) Rebuild(used iter.Seq2[store.Slot, int]) error {
	if err := s.Store.Rebuild(used); err != nil {
		return err
	}
	s.wake()
	return nil
}

// room is how many bytes are free in the fast tier.
func (s *Store) room() int64 { return s.fast.Info().Free }

// Write writes to the fast tier if it has room.
func (s *Store) Write(op *store.Op) {
	s.Store.Write(op)
	if s.room() < s.reserve {
		s.wake()
	}
}

func (s *Store) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// again is called after a read of slots that were touched before.
func (s *Store) again(p *indirect.Part, slot store.Slot, n int) {
	if p == s.slow && s.room() > s.reserve {
		select {
		case s.wanted <- span{slot, n}:
		default:
		}
	}
}

// Stats is what is where, and what was moved, in slots.
type Stats struct {
	Fast, Slow        int64 // there now
	Demoted, Promoted int64 // ever moved to the slow tier, and to the fast one
	Failed            int64 // batches of which something could not be moved
}

// Stats tells where things are.
func (s *Store) Stats() Stats {
	return Stats{Fast: s.fast.Used(), Slow: s.slow.Used(), Demoted: s.demoted.Load(), Promoted: s.promoted.Load(), Failed: s.failed.Load()}
}

// mover moves contents until the store is closed.
func (s *Store) mover() {
	var spare []store.Slot
	retry := retryFirst
	for {
		select {
		case <-s.Closed():
			return
		case <-s.kick:
			err := s.demote(&spare)
			if err == nil {
				retry = retryFirst
				continue
			}
			if errors.Is(err, store.ErrClosed) {
				return
			}
			s.failed.Add(1)
			if retry == retryFirst {
				s.log.Warn("contents stay in the fast tier: the slow one does not take them (is there space on its file system?)", "err", err)
			}
			select { // writes kick all the time; the slow tier needs time to heal
			case <-s.Closed():
				return
			case <-time.After(retry):
			}
			retry = min(2*retry, retryLast)
			s.wake()
		case w := <-s.wanted:
			if s.room() < s.reserve {
				continue
			}
			slots := spare[:0]
			for i := range min(w.n, batch) {
				slots = append(slots, w.slot+store.Slot(i))
			}
			n, err := s.Move(slots, s.slow, one(s.fast), false)
			s.promoted.Add(int64(n))
			if err != nil && !errors.Is(err, store.ErrNoSpace) {
				s.failed.Add(1)
				s.log.Warn("contents stay in the slow tier", "err", err)
			}
			spare = slots
		}
	}
}

func one(p *indirect.Part) func(int) *indirect.Part {
	return func(try int) *indirect.Part {
		if try > 0 {
			return nil
		}
		return p
	}
}

// demote moves cold contents to the slow tier until twice the reserve is free, or all there is was tried.
func (s *Store) demote(spare *[]store.Slot) error {
	var last error
	for s.room() < 2*s.reserve && s.fast.Used() > 0 {
		cold := (*spare)[:0]
		for wraps := 0; len(cold) == 0 && wraps < 3; { // touched, then cold: two rounds see all
			end := false
			if s.hand, cold, end = s.Cool(s.fast, s.hand, cold); end {
				s.hand = 1
				wraps++
			}
		}
		*spare = cold
		if len(cold) == 0 {
			return last
		}
		n, err := s.Move(cold, s.fast, one(s.slow), false)
		s.demoted.Add(int64(n))
		if err != nil && (n == 0 || !errors.Is(err, store.ErrCorrupt)) {
			return err
		}
		last = err
	}
	return last
}

// Close ends moving, serves what is under way, and closes the tiers.
func (s *Store) Close() error {
	err := s.Store.Close()
	s.work.Wait()
	if err != nil {
		return fmt.Errorf("close tiered store: %w", err)
	}
	return nil
}
