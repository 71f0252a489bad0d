package vm

import (
	"bytes"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"machpager/pager/emm"
)

// tardy is a manager that completes returns on a goroutine of its own, some time later, and counts them.
type tardy struct {
	shelf
	delay  time.Duration
	counts sync.Map     // of off to *atomic.Int64: returns of the page
	copies atomic.Int64 // pages returned of which the vm kept a copy
	out    sync.WaitGroup
}

func (s *tardy) DataReturn(h emm.Head, off int64, data []byte, dirty, kernelCopy bool) emm.KernReturn {
	for i := int64(0); i < int64(len(data)); i += s.size {
		n, _ := s.counts.LoadOrStore(off+i, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
		if kernelCopy {
			s.copies.Add(1)
		}
	}
	s.out.Go(func() {
		time.Sleep(s.delay)
		s.shelf.DataReturn(h, off, data, dirty, kernelCopy)
	})
	return emm.Success
}

// What is dirty is returned before its turn comes, while pages are evicted at all, and goes without being returned again: also what becomes a victim while its manager is
// about to store it. What is written to again in between is returned again.
func TestCleanedAhead(t *testing.T) {
	for _, c := range []struct {
		name  string
		ps    int
		delay time.Duration
	}{{"quick", 4096, 0}, {"slow", 4096, 5 * time.Millisecond}, {"slow, large pages", 16384, 5 * time.Millisecond}} {
		t.Run(c.name, func(t *testing.T) {
			v := newVM(t, 4<<20)
			s := &tardy{delay: c.delay}
			defer s.out.Wait()
			o := newObject(t, v, ObjectOptions{Size: 16 << 20, PageSize: c.ps, Manager: s, Port: emm.NewPort()})
			defer watch(t, o, 4<<20)()
			x := startTask(t, v)
			x.mapObject(o, 1, 0, o.Size(), false)
			const step = 64 << 10
			for off := int64(0); off < o.Size(); off += step {
				x.write(1, off, fillBytes(step, byte(off/step)))
			}
			ahead := v.Stats().CleanedAhead
			if got := s.copies.Load(); ahead == 0 || got < ahead {
				t.Errorf("%d pages were cleaned ahead, the manager saw %d of which the vm keeps a copy", ahead, got)
			}
			s.counts.Range(func(off, n any) bool {
				if n := n.(*atomic.Int64).Load(); n > 1 {
					t.Errorf("the page at %d was written once, and returned %d times", off, n)
				}
				return true
			})
			for off := int64(0); off < o.Size(); off += step {
				if got := x.read(1, off, step); !bytes.Equal(got, fillBytes(step, byte(off/step))) {
					t.Fatalf("offset %d: wrong bytes", off)
				}
				x.write(1, off+100, []byte{7})
			}
			for off := int64(0); off < o.Size(); off += step {
				want := fillBytes(step, byte(off/step))
				want[100] = 7
				if got := x.read(1, off, step); !bytes.Equal(got, want) {
					t.Fatalf("offset %d: wrong bytes after it was written to again", off)
				}
			}
			t.Logf("%d pages cleaned ahead of %d", ahead, o.Size()/int64(c.ps))
		})
	}
}

// A page that becomes a victim while it is being cleaned goes when the manager has it; one that the manager does not store stays, dirty, and is a victim another time.
func TestVictimWhileCleaned(t *testing.T) {
	v := newVM(t, 4<<20)
	s := &holder{held: make(chan func(), 4)}
	s.hold.Store(true)
	o := newObject(t, v, ObjectOptions{Size: 64 << 10, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	for _, s.result = range []emm.KernReturn{emm.Success, emm.Failure, emm.Success} {
		for p := range 4 {
			x.write(1, int64(p)*4096, []byte{1})
		}
		before := o.Stats()
		o.cleanRun(0, 4)
		cleaning := o.Stats().Returned - before.Returned
		if len(s.held) != 1 || cleaning == 0 {
			t.Fatalf("%d returns of %d pages, want one", len(s.held), cleaning)
		}
		begun := int64(0)
		for _, r := range v.policy.Victims(1, nil) {
			begun += o.evict(r.First, r.First+r.N, false)
		}
		if begun == 0 || v.inflight.Load() != begun {
			t.Fatalf("%d frames are on their way out, %d are counted", begun, v.inflight.Load())
		}
		(<-s.held)()
		if n := v.inflight.Load(); n != 0 {
			t.Errorf("%d frames are still counted as on their way", n)
		}
		want := before // what is not stored stays as it was
		if s.result == emm.Success {
			want.Resident, want.Dirty = before.Resident-begun, before.Dirty-cleaning
		}
		if got := o.Stats(); got.Resident != want.Resident || got.Dirty != want.Dirty {
			t.Errorf("%v: %d pages are resident, %d of them dirty; want %d, %d", s.result, got.Resident, got.Dirty, want.Resident, want.Dirty)
		}
		if n := v.policy.Stats().Resident; n != want.Resident {
			t.Errorf("%v: the policy knows of %d frames, want %d", s.result, n, want.Resident)
		}
		o.failing().works(o)
	}
}

// A victim that is being cleaned stays if its object would fall below its minimum by that.
func TestCleanedKeepsMinimum(t *testing.T) {
	v := newVM(t, 4<<20)
	s := &holder{held: make(chan func(), 4)}
	s.hold.Store(true)
	o := newObject(t, v, ObjectOptions{Size: 64 << 10, ResidentMin: 16 << 10, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	for p := range 5 {
		x.write(1, int64(p)*4096, []byte{1})
	}
	o.cleanRun(0, 1) // 5 resident, minimum 4: spares(1)
	o.cleanRun(1, 5)
	for _, r := range v.policy.Victims(100, nil) {
		o.evict(r.First, r.First+r.N, false)
	}
	for len(s.held) > 0 {
		(<-s.held)()
	}
	if n := o.resident.Load(); n < o.room.min {
		t.Errorf("%d frames resident, minimum %d", n, o.room.min)
	}
}

// A victim that is being cleaned stays while its thread holds the token for it.
func TestCleanedKeepsToken(t *testing.T) {
	v := newVM(t, 4<<20)
	s := &holder{held: make(chan func(), 4)}
	s.hold.Store(true)
	o := newObject(t, v, ObjectOptions{Size: 64 << 10, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	x.write(1, 0, []byte{1})
	o.cleanRun(0, 1)
	v.token.pressed()
	v.token.asks(m.task, 1, time.Now())
	v.token.got(m.task, 1, o, 0)
	if !v.token.holds(o, 0) {
		t.Fatal("not held")
	}
	begun := o.evict(0, 1, false)
	(<-s.held)()
	if w := o.word(0); !w.Resident() {
		t.Errorf("a page that the token holds was evicted: %v, begun %d", w, begun)
	}
}
