package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"machpager/pager/emm"
)

// watch holds the bytes of o that lie in its file, as the kernel counts, against a limit until stop, which returns the most that was seen. It counts pages: what
// stat and statfs tell is for moments larger by what khugepaged charges for a folio and gives up, because the mappings are registered.
func watch(t *testing.T, o *Object, limit int64) (stop func() int64) {
	done, ended, most := make(chan struct{}), make(chan struct{}), int64(0)
	go func() {
		defer close(ended)
		for {
			n, err := o.file.Occupied(0, o.size)
			for range 4 { // it counts one page after the other: one may go behind it, and another come before it
				if again, e := o.file.Occupied(0, o.size); e == nil {
					n = min(n, again)
				}
				if n <= limit {
					break
				}
			}
			if err != nil || n > limit {
				t.Errorf("%d bytes of the object are in its file, at most %d may be; %v", n, limit, err)
				return
			}
			most = max(most, n)
			select {
			case <-done:
				return
			case <-time.After(50 * time.Microsecond):
			}
		}
	}()
	return func() int64 {
		close(done)
		<-ended
		return most
	}
}

// An object at its maximum makes room among its own pages: never more are in its file, nothing is lost, and others keep theirs though they are older.
func TestResidentMax(t *testing.T) {
	for _, c := range []struct {
		ps       int
		max      int64
		internal bool
	}{{4096, 8 * 4096, false}, {4096, 1 << 20, true}, {65536, 8 * 65536, true}, {65536, 2 << 20, false}, {4096, 4 << 20, false}} {
		t.Run(fmt.Sprintf("page=%d,max=%d,internal=%v", c.ps, c.max, c.internal), func(t *testing.T) {
			v := newVM(t, 64<<20)
			v.SetDefaultManager(&shelf{})
			other := newObject(t, v, ObjectOptions{Size: 4 << 20, Manager: &shelf{}, Port: emm.NewPort()})
			opt := ObjectOptions{Size: 8 << 20, PageSize: c.ps, ResidentMax: c.max}
			if !c.internal {
				opt.Manager, opt.Port = &shelf{}, emm.NewPort()
			}
			o := newObject(t, v, opt)
			x, y := startTask(t, v), startTask(t, v)
			x.mapObject(other, 1, 0, other.Size(), false)
			for off := int64(0); off < other.Size(); off += 65536 {
				x.write(1, off, fillBytes(65536, 3))
			}
			m := x.mapObject(o, 2, 0, o.Size(), false)
			y.mapObject(o, 2, 0, o.Size(), false)
			stop := watch(t, o, c.max)
			want := make([]byte, o.Size())
			for off := int64(0); off < o.Size(); off += 60_000 {
				b := fillBytes(int(min(60_000, o.Size()-off)), byte(off/60_000))
				x.write(2, off, b)
				copy(want[off:], b)
			}
			for range 1000 {
				off := rand.Int64N(o.Size() - 5000)
				if got := y.read(2, off, 5000); !bytes.Equal(got, want[off:off+5000]) {
					t.Fatalf("offset %d: wrong bytes", off)
				}
			}
			if err := m.Populate(context.Background(), 0, c.max+int64(c.ps), false); !errors.Is(err, emm.ResourceShortage) {
				t.Errorf("populate of more than the maximum: %v", err)
			}
			if err := m.Populate(context.Background(), 0, c.max/2, true); err != nil {
				t.Errorf("populate of half the maximum: %v", err)
			}
			if most := stop(); most < c.max/2 {
				t.Errorf("at most %d bytes were resident, %d may be", most, c.max)
			}
			if n, err := other.file.Occupied(0, other.size); err != nil || n != other.Size() {
				t.Errorf("%d bytes of the other object are resident, want all %d; %v", n, other.Size(), err)
			}
		})
	}
}

// No page goes lost or stale under a maximum, whoever else pages out, in two tasks of many threads.
func TestResidentMaxStress(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 8 << 20, ResidentMax: 256 << 10, Manager: &shelf{}, Port: emm.NewPort()})
	stop := watch(t, o, 256<<10)
	var wg sync.WaitGroup
	for i := range 2 {
		x := startTask(t, v)
		x.mapObject(o, 1, 0, o.Size(), false)
		wg.Go(func() {
			r := x.do(order{Op: "stress", ID: 1, N: o.Size(), Seconds: 2, Seed: 9, Slot: i, Slots: 2, Threads: 16}, nil)
			if r.Wrong > 0 || r.Ops == 0 {
				t.Errorf("%d wrong values in %d operations", r.Wrong, r.Ops)
			}
		})
	}
	wg.Wait()
	stop()
}

// Progress with one instruction's need and as much again, as under the smallest budget.
func TestResidentMaxSmallest(t *testing.T) {
	v := newVM(t, 16<<20)
	x := startTask(t, v)
	for id := range 2 {
		o := newObject(t, v, ObjectOptions{Size: 512 << 10, ResidentMax: 8 * 4096, Manager: &shelf{}, Port: emm.NewPort()})
		x.mapObject(o, id, 0, o.Size(), false)
		defer watch(t, o, 8*4096)()
	}
	if r := x.do(order{Op: "copies", ID: 0, Threads: 64, Slots: 2, Seconds: 30}, nil); r.Wrong > 0 {
		t.Errorf("%d wrong copies", r.Wrong)
	}
}

// An object at its minimum gives no victims, however old its pages are and however long others stream by.
func TestResidentMin(t *testing.T) {
	const keep = 2 << 20
	v := newVM(t, 4<<20)
	x := startTask(t, v)
	o := newObject(t, v, ObjectOptions{Size: 3 << 20, ResidentMin: keep, Manager: &shelf{}, Port: emm.NewPort()})
	stream := newObject(t, v, ObjectOptions{Size: 32 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x.mapObject(o, 1, 0, o.Size(), false)
	x.mapObject(stream, 2, 0, stream.Size(), false)
	for off := int64(0); off < o.Size(); off += 65536 {
		x.write(1, off, fillBytes(65536, byte(off>>16)))
	}
	for round := range 2 {
		for off := int64(0); off < stream.Size(); off += 65536 {
			if !x.write(2, off, fillBytes(65536, byte(off>>16))) {
				t.Fatalf("offset %d: a fault", off)
			}
			if n, err := o.file.Occupied(0, o.size); err != nil || n < keep {
				t.Fatalf("round %d, offset %d: %d bytes of the object are resident, want at least %d; %v", round, off, n, keep, err)
			}
		}
	}
	n, err := o.file.Occupied(0, o.size)
	if err != nil || n > keep+keep/8 {
		t.Errorf("%d bytes are resident, %v: what is above the minimum of %d should have gone", n, err, keep)
	}
	for off := int64(0); off < o.Size(); off += 65536 {
		if !bytes.Equal(x.read(1, off, 65536), fillBytes(65536, byte(off>>16))) {
			t.Errorf("offset %d: wrong bytes", off)
		}
	}
	// On request its pages go.
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	if n, err := o.file.Occupied(0, o.size); err != nil || n != 0 {
		t.Errorf("%d bytes are resident after page-out, %v", n, err)
	}
}

func TestResidentLimits(t *testing.T) {
	v := newVM(t, 4<<20)
	ctx := context.Background()
	make := func(low, high int64, ps int) (*Object, error) {
		return v.NewObject(ObjectOptions{Size: 8 << 20, PageSize: ps, ResidentMin: low, ResidentMax: high})
	}
	for _, c := range []struct {
		low, high int64
		ps        int
		want      error
	}{{-1, 0, 0, emm.InvalidArgument}, {0, -1, 0, emm.InvalidArgument}, {0, 8*4096 - 1, 0, emm.InvalidArgument}, {0, 8*65536 - 1, 65536, emm.InvalidArgument},
		{2 << 20, 1 << 20, 0, emm.InvalidArgument}, {4 << 20, 0, 0, emm.ResourceShortage}, {1 << 60, 0, 0, emm.ResourceShortage}} {
		if _, err := make(c.low, c.high, c.ps); !errors.Is(err, c.want) {
			t.Errorf("minimum %d, maximum %d, pages of %d: %v, want %v", c.low, c.high, c.ps, err, c.want)
		}
	}
	a, err := make(2<<20, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := make(2<<20, 0, 0); !errors.Is(err, emm.ResourceShortage) {
		t.Errorf("minima of the whole budget: %v", err)
	}
	b, err := make(1<<20, 1<<20, 65536)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.SetBudget(ctx, 3<<20); !errors.Is(err, emm.ResourceShortage) {
		t.Errorf("a budget below the minima: %v", err)
	}
	x := startTask(t, v)
	m := x.mapObject(b, 1, 0, b.Size(), false)
	if err := m.Wire(ctx, 0, 1<<20); !errors.Is(err, emm.ResourceShortage) {
		t.Errorf("wiring all that may be resident: %v", err)
	}
	if err := m.Wire(ctx, 0, 1<<19); err != nil {
		t.Errorf("wiring half of it: %v", err)
	}
	for off := int64(0); off < b.Size(); off += 4096 {
		if x.read(1, off, 1) == nil {
			t.Fatalf("offset %d: a fault", off)
		}
	}
	if n, w := v.wired.Load(), b.room.wired.Load(); n != 128 || w != 128 {
		t.Errorf("%d and %d frames wired, want 128", n, w)
	}
	m.Close()
	if n, w := v.wired.Load(), b.room.wired.Load(); n != 0 || w != 0 {
		t.Errorf("%d and %d frames wired after the mapping closed", n, w)
	}
	a.Terminate()
	if err := v.SetBudget(ctx, 3<<20); err != nil {
		t.Errorf("an object's minimum counts after its end: %v", err)
	}
	b.Terminate()
	if n, p := v.guaranteed.frames.Load(), v.guaranteed.promised.Load(); n != 0 || p != 0 {
		t.Errorf("%d frames are guaranteed to nobody, %d promised", n, p)
	}
}
