package storetest

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"

	"machpager/pager/store"
)

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
