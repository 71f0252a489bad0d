// Package storetest is the conformance suite for stores, and a store that fails on demand ([Faulty]).
package storetest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"machpager/pager/store"
)

// Deadline is how long one operation may take.
const Deadline = 20 * time.Second

// Harness makes the store under test.
type Harness struct {
	// New makes an empty store. capacity is in bytes, 0 for none. The suite closes it.
	New func(t testing.TB, capacity int64) store.Store
	// Corrupt changes one bit of a slot's contents behind the store's back.
	Corrupt func(t testing.TB, s store.Store, slot store.Slot)
}

// Tests are the parts of the suite by name.
var Tests = map[string]func(t *testing.T, h Harness){
	"RoundTrip":        testRoundTrip,
	"ContiguousRuns":   testContiguousRuns,
	"OverwriteByNew":   testOverwriteByNew,
	"FreeAndReuse":     testFreeAndReuse,
	"Fragmentation":    testFragmentation,
	"Capacity":         testCapacity,
	"Corruption":       testCorruption,
	"NeverWritten":     testNeverWritten,
	"BadOperations":    testBadOperations,
	"View":             testView,
	"Rebuild":          testRebuild,
	"RebuildTwiceUsed": testRebuildTwiceUsed,
	"Concurrency":      testConcurrency,
	"Closed":           testClosed,
	"Faults":           testFaults,
	"NoAllocation":     testNoAllocation,
}

// Flip changes one bit of the byte at off, for [Harness].Corrupt of a store in a file.
func Flip(t testing.TB, f *os.File, off int64) {
	t.Helper()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

// Run runs all of the suite.
func Run(t *testing.T, h Harness) {
	names := make([]string, 0, len(Tests))
	for name := range Tests {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		t.Run(name, func(t *testing.T) { Tests[name](t, h) })
	}
}

func (h Harness) open(t testing.TB, capacity int64) store.Store {
	t.Helper()
	s := h.New(t, capacity)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("close again: %v", err)
		}
	})
	return s
}

// Fill makes contents that tell slot and version, different in every word.
func Fill(b []byte, seed uint64) {
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := 0; i+8 <= len(b); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
}

func contents(n int, seed uint64) []byte {
	b := make([]byte, n*store.SlotSize)
	Fill(b, seed)
	return b
}

// Do runs one operation and waits for it. It fails the test if Done is not called exactly once.
func Do(t testing.TB, call func(*store.Op), slot store.Slot, data []byte) (good int, err error) {
	t.Helper()
	done := make(chan struct{}, 2)
	op := &store.Op{Slot: slot, Data: data, Done: func(*store.Op) { done <- struct{}{} }}
	call(op)
	select {
	case <-done:
	case <-time.After(Deadline):
		t.Fatalf("operation on slot %d: not done after %v", slot, Deadline)
	}
	select {
	case <-done:
		t.Fatalf("operation on slot %d: done twice", slot)
	default:
	}
	return op.Good, op.Err
}

func alloc(t testing.TB, s store.Store, n, unit int) (store.Slot, int) {
	t.Helper()
	slot, m, err := s.Alloc(n, unit)
	if err != nil {
		t.Fatalf("alloc %d by %d: %v", n, unit, err)
	}
	if slot == store.None || m <= 0 || m > n || m%unit != 0 {
		t.Fatalf("alloc %d by %d: got slot %d, %d slots", n, unit, slot, m)
	}
	return slot, m
}

func write(t testing.TB, s store.Store, slot store.Slot, data []byte) {
	t.Helper()
	if _, err := Do(t, s.Write, slot, data); err != nil {
		t.Fatalf("write %d slots at %d: %v", len(data)/store.SlotSize, slot, err)
	}
}

func expect(t testing.TB, s store.Store, slot store.Slot, want []byte) {
	t.Helper()
	got := contents(len(want)/store.SlotSize, ^uint64(slot))
	if _, err := Do(t, s.Read, slot, got); err != nil {
		t.Fatalf("read %d slots at %d: %v", len(want)/store.SlotSize, slot, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("read %d slots at %d: wrong contents", len(want)/store.SlotSize, slot)
	}
	b, err := s.View(slot, len(want)/store.SlotSize)
	if err != nil {
		t.Fatalf("view slot %d: %v", slot, err)
	}
	if b != nil && !bytes.Equal(b, want) {
		t.Fatalf("view slot %d: wrong contents", slot)
	}
}

func testView(t *testing.T, h Harness) {
	s := h.open(t, 0)
	slot, _ := alloc(t, s, 512, 512)
	want := contents(512, 77)
	write(t, s, slot, want)
	b, err := s.View(slot, 512)
	if err != nil {
		t.Fatal(err)
	}
	if lends := s.Info().Lends; lends != (b != nil) {
		t.Fatalf("info says lends: %v, view gave %d bytes", lends, len(b))
	}
	if b == nil {
		return
	}
	for i := range 2 * store.GroupSlots / 512 { // a view stays right while other slots come and go, and the store grows
		other, m := alloc(t, s, 512, 1)
		write(t, s, other, contents(min(m, 8), uint64(i)))
		if i%2 == 0 {
			s.Free(other, m)
		}
	}
	if !bytes.Equal(b, want) {
		t.Error("a view changed before its slots were freed")
	}
}

func testRebuild(t *testing.T, h Harness) {
	s := h.open(t, 1024*store.SlotSize)
	type run struct {
		slot store.Slot
		n    int
		v    uint64
	}
	var kept []run
	for i := range 40 {
		slot, m := alloc(t, s, 1+i%9, 1)
		write(t, s, slot, contents(m, uint64(i)))
		if i%3 != 0 {
			kept = append(kept, run{slot, m, uint64(i)})
		}
	}
	used := 0
	err := s.Rebuild(func(yield func(store.Slot, int) bool) {
		for _, r := range kept {
			used += r.n
			if !yield(r.slot, r.n) {
				return
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if i := s.Info(); i.Used != int64(used)*store.SlotSize {
		t.Errorf("info after rebuild: %d used, want %d", i.Used, used*store.SlotSize)
	}
	for range 1024 - used { // all others are free, and none of the used is given
		slot, _ := alloc(t, s, 1, 1)
		write(t, s, slot, contents(1, 999))
	}
	if _, _, err := s.Alloc(1, 1); !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("alloc when all are used: %v", err)
	}
	for _, r := range kept {
		expect(t, s, r.slot, contents(r.n, r.v))
	}
}

func testRebuildTwiceUsed(t *testing.T, h Harness) {
	s := h.open(t, 64*store.SlotSize)
	slot, _ := alloc(t, s, 4, 4)
	write(t, s, slot, contents(4, 1))
	for name, runs := range map[string][2]store.Slot{"overlap": {slot, slot + 3}, "beyond": {slot, 1 << 30}, "none": {slot, store.None}} {
		err := s.Rebuild(func(yield func(store.Slot, int) bool) {
			_ = yield(runs[0], 4) && yield(runs[1], 4)
		})
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func testConcurrency(t *testing.T, h Harness) {
	const workers, rounds = 8, 80
	s := h.open(t, workers*64*store.SlotSize)
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for w := range workers {
		wg.Go(func() {
			if err := churn(s, uint64(w), rounds); err != nil {
				errs <- err
			}
		})
	}
	end := make(chan struct{})
	go func() { wg.Wait(); close(end) }()
	select {
	case <-end:
	case <-time.After(3 * Deadline):
		t.Fatal("operations hang")
	}
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	if i := s.Info(); i.Used != 0 {
		t.Errorf("%d bytes leaked", i.Used)
	}
}

// churn allocates, writes, reads back and frees.
func churn(s store.Store, seed uint64, rounds int) error {
	rng := rand.New(rand.NewPCG(seed, 5))
	done := make(chan *store.Op, 1)
	do := func(call func(*store.Op), slot store.Slot, data []byte) error {
		call(&store.Op{Slot: slot, Data: data, Prefetch: rng.IntN(2) == 0, Done: func(op *store.Op) { done <- op }})
		return (<-done).Err
	}
	type run struct {
		slot store.Slot
		n    int
		v    uint64
	}
	var have []run
	check := func(r run) error {
		got := make([]byte, r.n*store.SlotSize)
		if err := do(s.Read, r.slot, got); err != nil {
			return fmt.Errorf("read %d+%d: %w", r.slot, r.n, err)
		}
		if !bytes.Equal(got, contents(r.n, r.v)) {
			return fmt.Errorf("read %d+%d: wrong contents", r.slot, r.n)
		}
		return nil
	}
	for i := range rounds {
		if len(have) < 4 {
			slot, m, err := s.Alloc(1+rng.IntN(16), 1)
			if err != nil {
				return err
			}
			r := run{slot, m, seed<<32 | uint64(i)}
			if err := do(s.Write, slot, contents(m, r.v)); err != nil {
				return err
			}
			have = append(have, r)
		}
		k := rng.IntN(len(have))
		if err := check(have[k]); err != nil {
			return err
		}
		if rng.IntN(3) == 0 || i == rounds-1 {
			s.Free(have[k].slot, have[k].n)
			have = append(have[:k], have[k+1:]...)
		}
	}
	for _, r := range have {
		if err := check(r); err != nil {
			return err
		}
		s.Free(r.slot, r.n)
	}
	return nil
}

func testNoAllocation(t *testing.T, h Harness) {
	if raceEnabled {
		return // the race detector allocates
	}
	s := h.open(t, 0)
	slot, _ := alloc(t, s, 1, 1)
	data := contents(1, 1)
	write(t, s, slot, data)
	done := make(chan struct{}, 1)
	op := &store.Op{Done: func(*store.Op) { done <- struct{}{} }}
	n := testing.AllocsPerRun(200, func() {
		op.Slot, op.Data = slot, data
		s.Write(op)
		<-done
		s.Read(op)
		<-done
		if _, err := s.View(slot, 1); err != nil {
			t.Error(err)
		}
		a, m, _ := s.Alloc(1, 1)
		s.Free(a, m)
	})
	if n != 0 {
		t.Errorf("%v allocations for a write, a read, a view, an alloc and a free, want 0", n)
	}
}
