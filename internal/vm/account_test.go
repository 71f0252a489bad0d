package vm

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"machpager/pager/emm"
)

// The objects of one account make room among their own pages: together they never have more in their files, nothing is lost, and those of others keep theirs though they are older.
func TestAccount(t *testing.T) {
	for _, ps := range []int{4096, 65536} {
		v := newVM(t, 64<<20)
		limit := max(1<<20, minResidentMax*int64(ps))
		a, err := NewAccount(limit)
		if err != nil {
			t.Fatal(err)
		}
		other := newObject(t, v, ObjectOptions{Size: 4 << 20, Manager: &shelf{}, Port: emm.NewPort()})
		x := startTask(t, v)
		x.mapObject(other, 0, 0, other.Size(), false)
		for off := int64(0); off < other.Size(); off += 65536 {
			x.write(0, off, fillBytes(65536, 3))
		}
		var objects []*Object
		for i := range 3 {
			o := newObject(t, v, ObjectOptions{Size: 2 << 20, PageSize: ps, Manager: &shelf{}, Port: emm.NewPort(), Account: a})
			x.mapObject(o, i+1, 0, o.Size(), false)
			objects = append(objects, o)
		}
		done := make(chan struct{})
		var most int64
		var wg sync.WaitGroup
		wg.Go(func() { // from the kernel's side: what is in the files, one after the other, twice, for pages come and go meanwhile
			for {
				n := int64(1) << 62
				for range 4 {
					all := int64(0)
					for _, o := range objects {
						if f, err := o.file.Occupied(0, o.size); err == nil {
							all += f
						}
					}
					n = min(n, all)
				}
				if most = max(most, n); n > limit {
					t.Errorf("%d bytes are in the files of an account of %d", n, limit)
				}
				select {
				case <-done:
					return
				case <-time.After(100 * time.Microsecond):
				}
			}
		})
		for round := range 2 {
			for off := int64(0); off < 2<<20; off += 32 << 10 {
				for i := range objects {
					if round == 1 {
						if got := x.read(i+1, off, 32<<10); !bytes.Equal(got, fillBytes(32<<10, byte(off>>15)+byte(i))) {
							t.Fatalf("object %d, offset %d: wrong bytes", i, off)
						}
					}
					x.write(i+1, off, fillBytes(32<<10, byte(off>>15)+byte(i)))
				}
			}
		}
		close(done)
		wg.Wait()
		if most < limit/4 {
			t.Errorf("at most %d bytes were resident, %d may be", most, limit)
		}
		if n, err := other.file.Occupied(0, other.size); err != nil || n != other.Size() {
			t.Errorf("%d bytes of the other object are resident, want all %d; %v", n, other.Size(), err)
		}
		for _, o := range objects {
			o.Terminate()
		}
		if n := a.Resident(); n != 0 {
			t.Errorf("the account has %d bytes when its objects have ended", n)
		}
	}
}

// What cannot be made room for is an error for the account's own faults alone: what is wired, or cannot be stored. It heals.
func TestAccountFull(t *testing.T) {
	v := newVM(t, 16<<20)
	a, err := NewAccount(64 << 12)
	if err != nil {
		t.Fatal(err)
	}
	s := &overfull{}
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: s, Port: emm.NewPort(), Account: a})
	other := newObject(t, v, ObjectOptions{Size: 8 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(other, 1, 0, other.Size(), false)

	ctx := context.Background()
	if err := m.Wire(ctx, 0, 64<<12); !errors.Is(err, emm.ResourceShortage) {
		t.Errorf("wire all that the account may have: %v", err)
	}
	if err := m.Populate(ctx, 0, 65<<12, false); !errors.Is(err, emm.ResourceShortage) {
		t.Errorf("populate more than the account may have: %v", err)
	}
	if _, err := v.NewObject(ObjectOptions{Size: 16 << 20, PageSize: 2 << 20, Manager: &shelf{}, Port: emm.NewPort(), Account: a}); !errors.Is(err, emm.ResourceShortage) {
		t.Errorf("pages of which the account may not have eight: %v", err)
	}
	s.full.Store(true)
	write := func(p int64) bool { return x.write(1, p<<12, []byte{1}) }
	for p := range int64(64) {
		if !write(p) {
			t.Fatalf("page %d of 64 that may be resident: a fault failed", p)
		}
	}
	start := time.Now()
	for p := int64(64); p < 70; p++ {
		if write(p) {
			continue // what was only read ahead could go
		}
		if d := time.Since(start); d < shortageAfter/2 {
			t.Errorf("an error after %v", d)
		}
		break
	}
	if time.Since(start) > 3*shortageAfter {
		t.Errorf("%v until the error", time.Since(start))
	}
	start = time.Now()
	for off := int64(0); off < other.Size(); off += 64 << 10 {
		if !y.write(1, off, fillBytes(4096, 1)) {
			t.Fatal("a fault of another owner's object failed")
		}
	}
	if d := time.Since(start); d > shortageAfter {
		t.Errorf("another owner took %v", d)
	}
	s.full.Store(false)
	for p := int64(64); p < 128; p++ {
		for try := 0; !write(p); try++ {
			if try == 100 {
				t.Fatalf("there is room again, and a fault on page %d fails: %v; account %d of %d, lack %d, full %v, %+v", p, o.word(p), a.used.Load(), a.max, a.lack.Load(), a.full.Load(), o.Stats())
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// overfull is a shelf that stores nothing while it is full.
type overfull struct {
	shelf
	full atomic.Bool
}

func (s *overfull) DataReturn(h emm.Head, off int64, data []byte, dirty, kernelCopy bool) emm.KernReturn {
	if s.full.Load() {
		return h.Control.ReturnCompleted(emm.Run{Off: off, Size: int64(len(data))}, emm.ResourceShortage)
	}
	return s.shelf.DataReturn(h, off, data, dirty, kernelCopy)
}

// A task has no more than so many data requests out, over all its objects; the faults beyond wait, and none is lost.
func TestTaskFaults(t *testing.T) {
	v := newVM(t, 16<<20)
	v.taskFaults = 4
	var objects []*Object
	x := startTask(t, v)
	for i := range 3 {
		o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: &library{delay: 2 * time.Millisecond}, Port: emm.NewPort(), ClusterSize: 4096})
		x.mapObject(o, i, 0, o.Size(), false)
		objects = append(objects, o)
	}
	stop, most := make(chan struct{}), int64(0)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			n := int64(0)
			for _, o := range objects {
				o.reqMu.Lock()
				n += int64(len(o.requests))
				o.reqMu.Unlock()
			}
			most = max(most, n)
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Microsecond):
			}
		}
	})
	if r := x.do(order{Op: "copies", ID: 0, Threads: 16, Slots: 2, Seconds: 30}, nil); r.Wrong > 0 {
		t.Errorf("%d wrong copies", r.Wrong)
	}
	close(stop)
	wg.Wait()
	if most > 4 || most < 2 {
		t.Errorf("%d data requests were out at once, 4 may be", most)
	}
	if n := x.requests.Load(); n != 0 {
		t.Errorf("%d are counted when all are answered", n)
	}
}

// Faults that wait for room under their own owner's maximum take nothing of others.
func TestAccountAlone(t *testing.T) {
	v := newVM(t, 64<<20)
	const ps = 2 << 20
	a, err := NewAccount(8 * ps)
	if err != nil {
		t.Fatal(err)
	}
	s := &overfull{}
	s.full.Store(true)
	o := newObject(t, v, ObjectOptions{Size: 64 << 20, PageSize: ps, Manager: s, Port: emm.NewPort(), Account: a})
	other := newObject(t, v, ObjectOptions{Size: 40 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	y := startTask(t, v)
	y.mapObject(other, 1, 0, other.Size(), false)
	for off := int64(0); off < other.Size(); off += 64 << 10 {
		y.write(1, off, fillBytes(64<<10, 1))
	}
	before := other.Stats().Resident
	for i := range int64(8) {
		x := startTask(t, v)
		x.mapObject(o, 1, 0, o.Size(), false)
		if i == 0 {
			for p := range int64(8) {
				x.write(1, p*ps, []byte{1})
			}
		}
		go x.write(1, (8+i)*ps, []byte{1})
	}
	time.Sleep(2 * time.Second)
	after := other.Stats().Resident
	if after < before {
		t.Errorf("the other's object had %d pages resident, now %d", before, after)
	}
	s.full.Store(false)
	time.Sleep(time.Second)
}
