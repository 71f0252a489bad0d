package storetest

import (
	"fmt"
	"io"
	"iter"
	"sync"
	"time"

	"machpager/pager/store"
)

// On says which calls of a store a fault strikes; a set.
type On uint8

// The calls that can be struck.
const (
	OnAlloc On = 1 << iota
	OnRead
	OnWrite
	OnView
)

// Fault is something that goes wrong. The zero values strike every call named by On, for ever.
type Fault struct {
	Label string // names it in errors and for Hits
	On    On
	Match func(s store.Slot, n int) bool // which runs of slots; nil: all. Alloc has slot None
	Skip  int                            // the first so many matching calls are spared
	Times int                            // how many calls are struck. 0: all

	Err     error           // the call fails with it
	Delay   time.Duration   // it waits first, on a goroutine of its own
	Hold    <-chan struct{} // it waits until this is closed, on a goroutine of its own
	Short   int             // with ErrUnexpectedEOF or ErrShortWrite only so many leading slots are transferred; needs IsShort
	IsShort bool
	Corrupt bool // slot number Short of a read comes garbled, and the store notices: ErrCorrupt
}

// FaultError is the error of an injected fault.
type FaultError struct {
	Label string
	Err   error
}

func (e *FaultError) Error() string { return fmt.Sprintf("injected fault %q: %v", e.Label, e.Err) }

// Unwrap is what Fault.Err was.
func (e *FaultError) Unwrap() error { return e.Err }

// Faulty is a store in which things go wrong on demand. Without faults it is the store it wraps.
type Faulty struct {
	store.Store
	pending sync.WaitGroup // calls that wait

	mu     sync.Mutex
	faults []*armed          // guarded by mu
	hits   map[string]int    // guarded by mu
	onStep func(name string) // guarded by mu
}

type armed struct {
	Fault
	seen, struck int
}

var _ store.Store = (*Faulty)(nil)

// NewFaulty wraps a store. Closing it closes the store.
func NewFaulty(s store.Store) *Faulty { return &Faulty{Store: s, hits: make(map[string]int)} }

// Inject arms a fault; the function returned disarms it. The fault armed first strikes first.
func (f *Faulty) Inject(fault Fault) (disarm func()) {
	a := &armed{Fault: fault}
	f.mu.Lock()
	f.faults = append(f.faults, a)
	f.mu.Unlock()
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for i, x := range f.faults {
			if x == a {
				f.faults = append(f.faults[:i:i], f.faults[i+1:]...)
				return
			}
		}
	}
}

// Hits counts how often faults of this label struck.
func (f *Faulty) Hits(label string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hits[label]
}

// Step sets a function that is called at each step of the store: before and after each Alloc, Write and Free. A test copies memory there, as if the process
// had been killed.
func (f *Faulty) Step(step func(name string)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onStep = step
}

func (f *Faulty) step(name string) {
	f.mu.Lock()
	step := f.onStep
	f.mu.Unlock()
	if step != nil {
		step(name)
	}
}

// strike finds the fault that strikes a call.
func (f *Faulty) strike(on On, s store.Slot, n int) *Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.faults {
		if a.On&on == 0 || a.Match != nil && !a.Match(s, n) || a.Times > 0 && a.struck >= a.Times {
			continue
		}
		if a.seen++; a.seen <= a.Skip {
			continue
		}
		a.struck++
		f.hits[a.Label]++
		fault := a.Fault
		return &fault
	}
	return nil
}

// armedFor reports whether a fault could strike a call, without striking.
func (f *Faulty) armedFor(on On, s store.Slot, n int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.faults {
		if a.On&on != 0 && (a.Match == nil || a.Match(s, n)) && (a.Times == 0 || a.struck < a.Times) {
			return true
		}
	}
	return false
}

// Alloc allocates, or fails.
func (f *Faulty) Alloc(n, unit int) (store.Slot, int, error) {
	if fault := f.strike(OnAlloc, store.None, n); fault != nil && fault.Err != nil {
		return store.None, 0, &FaultError{fault.Label, fault.Err}
	}
	f.step("alloc")
	defer f.step("allocated")
	return f.Store.Alloc(n, unit)
}

// Free frees.
func (f *Faulty) Free(s store.Slot, n int) {
	f.step("free")
	f.Store.Free(s, n)
	f.step("freed")
}

// View lends, unless a fault is armed for views, or for reads: then those are to be struck.
func (f *Faulty) View(s store.Slot, n int) ([]byte, error) {
	if f.armedFor(OnRead, s, n) {
		return nil, nil
	}
	fault := f.strike(OnView, s, n)
	if fault == nil {
		return f.Store.View(s, n)
	}
	good := 0
	if fault.IsShort || fault.Corrupt {
		good = min(fault.Short, n-1)
	}
	b, err := f.Store.View(s, n)
	switch {
	case err != nil || b == nil:
		return b, err
	case fault.Corrupt:
		return b[:good*store.SlotSize], &FaultError{fault.Label, store.ErrCorrupt}
	case fault.Err != nil:
		return b[:good*store.SlotSize], &FaultError{fault.Label, fault.Err}
	case fault.IsShort:
		return b[:good*store.SlotSize], &FaultError{fault.Label, io.ErrUnexpectedEOF}
	}
	return nil, nil // a delay: cannot lend now
}

// Read reads, perhaps wrongly.
func (f *Faulty) Read(op *store.Op) { f.do(op, OnRead) }

// Write writes, perhaps in part.
func (f *Faulty) Write(op *store.Op) {
	f.step("write")
	if fn := f.stepped(); fn != nil {
		inner := &store.Op{Slot: op.Slot, Data: op.Data, Done: func(in *store.Op) {
			fn("written")
			op.Finish(in.Good, in.Err)
		}}
		f.do2(op, inner, OnWrite)
		return
	}
	f.do(op, OnWrite)
}

func (f *Faulty) stepped() func(string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.onStep
}

func (f *Faulty) do(op *store.Op, on On) { f.do2(op, op, on) }

// do2 runs inner, which ends in op, or has a fault strike op.
func (f *Faulty) do2(op, inner *store.Op, on On) {
	fault := f.strike(on, op.Slot, op.Slots())
	switch {
	case fault == nil:
		f.pass(inner, on)
	case fault.Delay > 0 || fault.Hold != nil:
		f.pending.Go(func() {
			time.Sleep(fault.Delay)
			if fault.Hold != nil {
				<-fault.Hold
			}
			f.fault(op, inner, on, fault)
		})
	default:
		f.fault(op, inner, on, fault)
	}
}

func (f *Faulty) pass(op *store.Op, on On) {
	if on == OnRead {
		f.Store.Read(op)
	} else {
		f.Store.Write(op)
	}
}

// fault does what the fault says in place of the operation.
func (f *Faulty) fault(op, inner *store.Op, on On, fault *Fault) {
	n := min(fault.Short, op.Slots()-1)
	switch {
	case fault.Corrupt && on == OnRead:
		f.pass(&store.Op{Slot: op.Slot, Data: op.Data, Done: func(in *store.Op) {
			if in.Err != nil {
				op.Finish(in.Good, in.Err)
				return
			}
			op.Data[n*store.SlotSize+17] ^= 0x40
			op.Finish(n, &FaultError{fault.Label, store.ErrCorrupt})
		}}, on)
	case fault.IsShort:
		err := error(&FaultError{fault.Label, io.ErrUnexpectedEOF})
		if on == OnWrite {
			err = &FaultError{fault.Label, io.ErrShortWrite}
		}
		if n == 0 {
			op.Finish(0, err)
			return
		}
		f.pass(&store.Op{Slot: op.Slot, Data: op.Data[:n*store.SlotSize], Done: func(in *store.Op) {
			if in.Err != nil {
				op.Finish(in.Good, in.Err)
				return
			}
			op.Finish(n, err)
		}}, on)
	case fault.Err != nil:
		op.Finish(0, &FaultError{fault.Label, fault.Err})
	default:
		f.pass(inner, on)
	}
}

// Rebuild rebuilds.
func (f *Faulty) Rebuild(used iter.Seq2[store.Slot, int]) error { return f.Store.Rebuild(used) }

// Close waits for what is delayed, and closes the store. What is held must be let go first.
func (f *Faulty) Close() error {
	f.pending.Wait()
	return f.Store.Close()
}
