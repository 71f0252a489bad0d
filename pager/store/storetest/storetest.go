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

func testRoundTrip(t *testing.T, h Harness) {
	s := h.open(t, 0)
	for _, n := range []int{1, 2, 3, 16, 511, 512} {
		slot, m := alloc(t, s, n, 1)
		want := contents(m, uint64(n))
		write(t, s, slot, want)
		expect(t, s, slot, want)
		for i := range min(m, 5) { // any part can be read alone
			expect(t, s, slot+store.Slot(i), want[i*store.SlotSize:(i+1)*store.SlotSize])
		}
		expect(t, s, slot+store.Slot(m/2), want[m/2*store.SlotSize:])
	}
	slot, _ := alloc(t, s, 1, 1)
	zero := make([]byte, store.SlotSize)
	write(t, s, slot, zero)
	expect(t, s, slot, zero)
}

func testContiguousRuns(t *testing.T, h Harness) {
	s := h.open(t, 0)
	used := map[store.Slot]bool{}
	for i := range 8 {
		slot, m := alloc(t, s, 512, 512)
		if m != 512 {
			t.Fatalf("alloc 512 slots in a fresh store: got %d", m)
		}
		for j := range store.Slot(m) {
			if used[slot+j] {
				t.Fatalf("slot %d was given twice", slot+j)
			}
			used[slot+j] = true
		}
		write(t, s, slot, contents(m, uint64(i)))
		one, _ := alloc(t, s, 1, 1)
		if used[one] {
			t.Fatalf("slot %d was given twice", one)
		}
		used[one] = true
	}
	if i := s.Info(); i.Used != int64(len(used))*store.SlotSize {
		t.Errorf("info: %d bytes used, want %d", i.Used, len(used)*store.SlotSize)
	}
}

func testOverwriteByNew(t *testing.T, h Harness) {
	s := h.open(t, 0)
	old, _ := alloc(t, s, 4, 1)
	first := contents(4, 1)
	write(t, s, old, first)
	for v := range uint64(50) { // new contents in new slots: the old ones are there until they are freed
		next, m := alloc(t, s, 4, 4)
		second := contents(m, v+2)
		write(t, s, next, second)
		expect(t, s, old, first)
		expect(t, s, next, second)
		s.Free(old, 4)
		old, first = next, second
		expect(t, s, old, first)
	}
	if i := s.Info(); i.Used != 4*store.SlotSize {
		t.Errorf("info: %d bytes used, want %d", i.Used, 4*store.SlotSize)
	}
}

func testFreeAndReuse(t *testing.T, h Harness) {
	const capacity = 1024
	s := h.open(t, capacity*store.SlotSize)
	rng := rand.New(rand.NewPCG(1, 2))
	have := map[store.Slot]uint64{}
	version := uint64(0)
	for round := range 200 {
		if rng.IntN(2) == 0 {
			n := 1 + rng.IntN(40)
			slot, m, err := s.Alloc(n, 1)
			if err != nil {
				if !errors.Is(err, store.ErrNoSpace) || len(have) < capacity {
					t.Fatalf("round %d: alloc %d with %d of %d used: %v", round, n, len(have), capacity, err)
				}
				continue
			}
			for i := range store.Slot(m) {
				if _, ok := have[slot+i]; ok {
					t.Fatalf("round %d: slot %d was given twice", round, slot+i)
				}
				version++
				have[slot+i] = version
				write(t, s, slot+i, contents(1, version))
			}
		} else {
			for slot := range have {
				if rng.IntN(3) == 0 {
					expect(t, s, slot, contents(1, have[slot]))
					s.Free(slot, 1)
					delete(have, slot)
				}
			}
		}
	}
	for slot, v := range have {
		expect(t, s, slot, contents(1, v))
	}
	if i := s.Info(); i.Used != int64(len(have))*store.SlotSize || i.Used+i.Free != i.Total {
		t.Errorf("info: %+v, want %d slots used", i, len(have))
	}
}

func testFragmentation(t *testing.T, h Harness) {
	const capacity = 256
	s := h.open(t, capacity*store.SlotSize)
	var all []store.Slot
	for range capacity {
		slot, _ := alloc(t, s, 1, 1)
		all = append(all, slot)
	}
	slices.Sort(all)
	for i := 0; i < capacity; i += 2 {
		s.Free(all[i], 1)
	}
	if _, m := alloc(t, s, 16, 1); m != 1 {
		t.Errorf("alloc 16 by 1 where no two are in a row: got %d", m)
	}
	if _, _, err := s.Alloc(16, 2); !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("alloc by 2 where no two are in a row: %v, want ErrNoSpace", err)
	}
	s.Free(all[101], 1) // with its neighbours a run of three, whichever of them is free
	s.Free(all[103], 1)
	if _, m := alloc(t, s, 16, 2); m%2 != 0 || m > 4 {
		t.Errorf("alloc 16 by 2: got %d", m)
	}
}

func testCapacity(t *testing.T, h Harness) {
	s := h.open(t, 64*store.SlotSize)
	if i := s.Info(); i.Total != 64*store.SlotSize || i.Free != i.Total {
		t.Fatalf("info of an empty store: %+v", i)
	}
	slot, m := alloc(t, s, 64, 1)
	want := contents(m, 9)
	write(t, s, slot, want)
	if m != 64 {
		t.Fatalf("alloc all: got %d", m)
	}
	for range 3 {
		if _, _, err := s.Alloc(1, 1); !errors.Is(err, store.ErrNoSpace) {
			t.Fatalf("alloc in a full store: %v, want ErrNoSpace", err)
		}
	}
	expect(t, s, slot, want)
	s.Free(slot+10, 2)
	got, m := alloc(t, s, 64, 1)
	if got != slot+10 || m != 2 {
		t.Fatalf("alloc after freeing %d+2: got %d+%d", slot+10, got, m)
	}
	expect(t, s, slot, want[:10*store.SlotSize])
	expect(t, s, slot+12, want[12*store.SlotSize:])
}

func testCorruption(t *testing.T, h Harness) {
	s := h.open(t, 0)
	slot, _ := alloc(t, s, 8, 8)
	want := contents(8, 3)
	write(t, s, slot, want)
	h.Corrupt(t, s, slot+5)
	got := make([]byte, len(want))
	good, err := Do(t, s.Read, slot, got)
	if !errors.Is(err, store.ErrCorrupt) || good != 5 {
		t.Fatalf("read with a corrupted slot 5: good %d, %v", good, err)
	}
	if !bytes.Equal(got[:5*store.SlotSize], want[:5*store.SlotSize]) {
		t.Error("the slots before the corrupted one are wrong")
	}
	if b, err := s.View(slot, 8); b != nil || err != nil {
		if !errors.Is(err, store.ErrCorrupt) || !bytes.Equal(b, want[:5*store.SlotSize]) {
			t.Errorf("view with a corrupted slot 5: %d bytes, %v", len(b), err)
		}
	}
	if _, err := Do(t, s.Read, slot+5, got[:store.SlotSize]); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("read the corrupted slot: %v", err)
	}
	expect(t, s, slot+6, want[6*store.SlotSize:])
	h.Corrupt(t, s, slot+5) // the same bit again: it is right again
	expect(t, s, slot, want)
}

func testNeverWritten(t *testing.T, h Harness) {
	s := h.open(t, 0)
	slot, _ := alloc(t, s, 4, 4)
	write(t, s, slot, contents(2, 1))
	got := make([]byte, 4*store.SlotSize)
	if good, err := Do(t, s.Read, slot, got); err == nil || good != 2 {
		t.Errorf("read slots that were never written: good %d, %v; want an error behind 2", good, err)
	}
}

func testBadOperations(t *testing.T, h Harness) {
	s := h.open(t, 64*store.SlotSize)
	slot, _ := alloc(t, s, 1, 1)
	write(t, s, slot, contents(1, 1))
	for _, c := range []struct {
		slot store.Slot
		n    int
	}{{store.None, store.SlotSize}, {slot, 0}, {slot, 100}, {slot, store.SlotSize + 1}, {1 << 39, store.SlotSize}, {^store.Slot(0), store.SlotSize}} {
		for name, call := range map[string]func(*store.Op){"read": s.Read, "write": s.Write} {
			if _, err := Do(t, call, c.slot, make([]byte, c.n)); err == nil {
				t.Errorf("%s %d bytes at slot %d: no error", name, c.n, c.slot)
			}
		}
	}
	for _, c := range [][2]int{{0, 1}, {-1, 1}, {1, 0}, {3, 2}, {1, -1}} {
		if slot, n, err := s.Alloc(c[0], c[1]); err == nil {
			t.Errorf("alloc %d by %d: no error, slot %d+%d", c[0], c[1], slot, n)
		}
	}
	expect(t, s, slot, contents(1, 1))
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

func testClosed(t *testing.T, h Harness) {
	s := h.New(t, 0)
	slot, _ := alloc(t, s, 64, 1)
	var done sync.WaitGroup
	errs := make([]error, 64)
	data := contents(64, 1)
	for i := range errs { // Close serves what was accepted before it
		done.Add(1)
		s.Write(&store.Op{Slot: slot + store.Slot(i), Data: data[i*store.SlotSize:][:store.SlotSize], Done: func(op *store.Op) { errs[i] = op.Err; done.Done() }})
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	done.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Errorf("writes before close: %v", err)
	}
	for name, call := range map[string]func(*store.Op){"read": s.Read, "write": s.Write} {
		if _, err := Do(t, call, slot, make([]byte, store.SlotSize)); !errors.Is(err, store.ErrClosed) {
			t.Errorf("%s after close: %v, want ErrClosed", name, err)
		}
	}
	if _, _, err := s.Alloc(1, 1); !errors.Is(err, store.ErrClosed) {
		t.Errorf("alloc after close: %v, want ErrClosed", err)
	}
	if b, err := s.View(slot, 1); b != nil || err != nil && !errors.Is(err, store.ErrClosed) {
		t.Errorf("view after close: %d bytes, %v", len(b), err)
	}
}

func testFaults(t *testing.T, h Harness) {
	f := NewFaulty(h.open(t, 0))
	slot, _ := alloc(t, f, 8, 8)
	want := contents(8, 4)
	write(t, f, slot, want)
	boom := errors.New("boom")
	got := make([]byte, len(want))

	off := f.Inject(Fault{Label: "eio", On: OnRead, Err: boom, Skip: 1, Times: 1})
	for i, fails := range []bool{false, true, false} {
		_, err := Do(t, f.Read, slot, got)
		var fe *FaultError
		if (err != nil) != fails || fails && (!errors.Is(err, boom) || !errors.As(err, &fe) || fe.Label != "eio") {
			t.Errorf("read %d: %v", i, err)
		}
	}
	off()
	off = f.Inject(Fault{Label: "short", On: OnRead | OnWrite, IsShort: true, Short: 3})
	if good, err := Do(t, f.Read, slot, got); good != 3 || err == nil || !bytes.Equal(got[:3*store.SlotSize], want[:3*store.SlotSize]) {
		t.Errorf("short read: good %d, %v", good, err)
	}
	if _, err := Do(t, f.Write, slot, want); err == nil {
		t.Error("short write: no error")
	}
	off()
	off = f.Inject(Fault{Label: "rot", On: OnRead, Corrupt: true, Short: 2})
	if good, err := Do(t, f.Read, slot, got); good != 2 || !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("corrupted read: good %d, %v", good, err)
	}
	off()
	start := time.Now()
	off = f.Inject(Fault{Label: "slow", On: OnRead, Delay: 30 * time.Millisecond})
	if _, err := Do(t, f.Read, slot, got); err != nil || time.Since(start) < 30*time.Millisecond {
		t.Errorf("slow read: %v after %v", err, time.Since(start))
	}
	off()
	off = f.Inject(Fault{Label: "full", On: OnAlloc, Err: store.ErrNoSpace})
	if _, _, err := f.Alloc(1, 1); !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("alloc: %v", err)
	}
	off()
	for label, n := range map[string]int{"eio": 1, "short": 2, "rot": 1, "slow": 1, "full": 1} {
		if f.Hits(label) != n {
			t.Errorf("fault %q struck %d times, want %d", label, f.Hits(label), n)
		}
	}
	expect(t, f, slot, want)
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
