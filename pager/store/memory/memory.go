// Package memory is a store that keeps slots in memory: in a [store.Memory], which may outlive the process.
//
// It answers inline and lends its memory. The memory is valid at every instant: contents and checksums are written before Done, and nobody
// looks at slots that no page map names. Free lists and counts are volatile; Rebuild makes them anew.
//
// # Layout
//
// Groups of 16384 slots, each behind its checksums:
//
//	16384 x CRC-32C   64 KiB
//	16384 x slot      64 MiB
//
// The size of the memory tells how many groups there are; the last may be cut off at the capacity.
//
// # Locks
//
// growMu (growing the memory) before the allocator's own lock. Contents are not locked: a slot's owner orders what happens to it.
package memory

import (
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/store"
)

const (
	sumsSize  = store.GroupSlots * 4
	groupSize = sumsSize + store.GroupSlots*store.SlotSize
)

// Options say how much is stored. nil or zero values are the defaults.
type Options struct {
	// Capacity is how many bytes of contents may be stored, rounded down to slots. 0: no bound of its own.
	Capacity int64
	// Slack is how many bytes of freed slots keep their memory, so that it can be reused without being given back and faulted in
	// again. 0: 8 MiB. Negative: none.
	Slack int64
}

// Store is a store in memory.
type Store struct {
	mem     store.Memory
	alloc   *store.Allocator
	slack   uint64 // immutable; slots
	bounded bool   // immutable

	growMu sync.Mutex
	bytes  atomic.Pointer[[]byte] // all of mem; replaced under growMu
	closed atomic.Bool
}

var _ store.Store = (*Store)(nil)

// New makes a store in mem, which becomes the store's. If mem has contents, they are an earlier store's, and Rebuild must be called next.
func New(mem store.Memory, o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	if o.Capacity < 0 || o.Capacity > 0 && o.Capacity < store.SlotSize {
		return nil, fmt.Errorf("make memory store: capacity of %d bytes: need at least one slot of %d: %w", o.Capacity, store.SlotSize, unix.EINVAL)
	}
	slack := o.Slack
	switch {
	case slack == 0:
		slack = 8 << 20
	case slack < 0:
		slack = 0
	}
	s := &Store{mem: mem, alloc: store.NewAllocator(uint64(o.Capacity / store.SlotSize)), slack: uint64(slack / store.SlotSize), bounded: o.Capacity > 0}
	b := mem.Bytes()
	s.bytes.Store(&b)
	return s, nil
}

// place is where the run's checksums and contents lie. It is empty if the run is not inside one group of the memory.
func (s *Store) place(slot store.Slot, n int) (sums, data []byte, ok bool) {
	if slot == store.None || slot > store.MaxSlot || n <= 0 {
		return nil, nil, false
	}
	b := *s.bytes.Load()
	g, i := int64(slot-1)/store.GroupSlots*groupSize, int64(slot-1)%store.GroupSlots
	off := g + sumsSize + i*store.SlotSize
	end := off + int64(n)*store.SlotSize
	if i+int64(n) > store.GroupSlots || end > int64(len(b)) {
		return nil, nil, false
	}
	return b[g+4*i : g+4*(i+int64(n))], b[off:end:end], true
}

// each calls f for the parts of a run, group by group, until an error. good counts the slots of the parts that were right.
func (s *Store) each(op *store.Op, f func(slot store.Slot, sums, data, buf []byte) (int, error)) (good int, err error) {
	slot, buf := op.Slot, op.Data
	if len(buf) == 0 || len(buf)%store.SlotSize != 0 {
		return 0, fmt.Errorf("access slot %d: %d bytes are no whole number of slots: %w", slot, len(buf), unix.EINVAL)
	}
	if s.closed.Load() {
		return 0, fmt.Errorf("access slot %d: %w", slot, store.ErrClosed)
	}
	for len(buf) > 0 {
		n := len(buf) / store.SlotSize
		if slot != store.None {
			n = min(n, store.GroupSlots-int(slot-1)%store.GroupSlots)
		}
		sums, data, ok := s.place(slot, n)
		if !ok {
			return good, fmt.Errorf("access slot %d: beyond the store: %w", slot, unix.EINVAL)
		}
		m, err := f(slot, sums, data, buf[:len(data)])
		good += m
		if err != nil {
			return good, err
		}
		slot, buf = slot+store.Slot(n), buf[len(data):]
	}
	return good, nil
}

// Read copies contents out, and checks the copy.
func (s *Store) Read(op *store.Op) { op.Finish(s.each(op, readPart)) }

func readPart(slot store.Slot, sums, data, buf []byte) (int, error) {
	for i := 0; i < len(data); i += store.SlotSize { // slot by slot, so that the check finds the copy in the cache
		copy(buf[i:i+store.SlotSize], data[i:])
		if _, err := store.CheckSums(sums[i/store.SlotSize*4:], buf[i:i+store.SlotSize], slot+store.Slot(i/store.SlotSize)); err != nil {
			return i / store.SlotSize, err
		}
	}
	return len(data) / store.SlotSize, nil
}

// Write copies contents in.
func (s *Store) Write(op *store.Op) { op.Finish(s.each(op, writePart)) }

func writePart(_ store.Slot, sums, data, buf []byte) (int, error) {
	for i := 0; i < len(data); i += store.SlotSize {
		store.PutSums(sums[i/store.SlotSize*4:], buf[i:i+store.SlotSize])
		failpoint.Here("memory.summed")
		copy(data[i:i+store.SlotSize], buf[i:])
		failpoint.Here("memory.copied")
	}
	return len(data) / store.SlotSize, nil
}

// View lends contents in place. A run that lies in two groups is not lent.
func (s *Store) View(slot store.Slot, n int) ([]byte, error) {
	if s.closed.Load() {
		return nil, fmt.Errorf("view slot %d: %w", slot, store.ErrClosed)
	}
	sums, data, ok := s.place(slot, n)
	if !ok {
		return nil, nil
	}
	good, err := store.CheckSums(sums, data, slot)
	return data[: good*store.SlotSize : good*store.SlotSize], err
}

// Alloc takes slots, and grows the memory to hold them.
func (s *Store) Alloc(n, unit int) (store.Slot, int, error) {
	if s.closed.Load() {
		return store.None, 0, fmt.Errorf("allocate %d slots: %w", n, store.ErrClosed)
	}
	return s.alloc.AllocReaching(n, unit, s.reach)
}

// reach makes the memory reach to the end of the group of slot last, or to the capacity.
func (s *Store) reach(last store.Slot) error {
	if _, _, ok := s.place(last, 1); ok {
		return nil
	}
	s.growMu.Lock()
	defer s.growMu.Unlock()
	if _, _, ok := s.place(last, 1); ok {
		return nil
	}
	capacity, _, _ := s.alloc.Counts()
	g := int64(last-1) / store.GroupSlots
	slots := min(int64(capacity)-g*store.GroupSlots, store.GroupSlots)
	if err := s.mem.Grow(g*groupSize + sumsSize + slots*store.SlotSize); err != nil {
		return err
	}
	failpoint.Here("memory.grown")
	b := s.mem.Bytes()
	s.bytes.Store(&b)
	return nil
}

// Free gives slots back, and the memory of free slots beyond the slack.
func (s *Store) Free(slot store.Slot, n int) {
	s.alloc.Free(slot, n, true)
	if _, _, backed := s.alloc.Counts(); backed > s.slack && !s.closed.Load() {
		s.alloc.Trim(s.slack/2, s.discard) // an error leaves the memory where it is: it is reused, or given back later
	}
}

func (s *Store) discard(slot store.Slot, n int) error {
	off := int64(slot-1)/store.GroupSlots*groupSize + sumsSize + int64(slot-1)%store.GroupSlots*store.SlotSize
	size := min(int64(n)*store.SlotSize, int64(len(*s.bytes.Load()))-off)
	if size <= 0 {
		return nil
	}
	failpoint.Here("memory.discard")
	defer failpoint.Here("memory.discarded")
	return s.mem.Discard(off, size)
}

// Rebuild takes over what an earlier store left in the memory.
func (s *Store) Rebuild(used iter.Seq2[store.Slot, int]) error {
	size := int64(len(*s.bytes.Load()))
	high := size / groupSize * store.GroupSlots
	if rest := size % groupSize; rest > sumsSize {
		high += (rest - sumsSize) / store.SlotSize
	}
	if err := s.alloc.Reset(uint64(high), used); err != nil {
		return err
	}
	return s.alloc.Trim(s.slack/2, s.discard)
}

// Info tells the capacity; without one, what is used and the memory the machine has free.
func (s *Store) Info() store.Info {
	capacity, used, _ := s.alloc.Counts()
	i := store.Info{Total: int64(capacity) * store.SlotSize, Used: int64(used) * store.SlotSize, Lends: true}
	var si unix.Sysinfo_t
	if !s.bounded && unix.Sysinfo(&si) == nil {
		i.Total = i.Used + int64(si.Freeram)*int64(si.Unit)
	}
	i.Free = i.Total - i.Used
	return i
}

// Close closes the memory. Views end with it: whoever has one must be done.
func (s *Store) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	if err := s.mem.Close(); err != nil {
		return errors.Join(errors.New("close memory store"), err)
	}
	return nil
}
