package vm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/frames"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// Frames that a manager has been given and does not answer for are not waited for: others go in their place, and who needs one gets it.
func TestHungManagerHoldsNoFrames(t *testing.T) {
	v := newVM(t, 4<<20)
	s := &holder{held: make(chan func(), 64)}
	hung := newObject(t, v, ObjectOptions{Size: 2 << 20, Manager: s, Port: emm.NewPort()})
	other := newObject(t, v, ObjectOptions{Size: 8 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	x.mapObject(hung, 1, 0, hung.Size(), false)
	y.mapObject(other, 1, 0, other.Size(), false)
	for off := int64(0); off < hung.Size(); off += 65536 {
		x.write(1, off, fillBytes(65536, 1))
	}
	s.hold.Store(true)
	ends(t, 20*time.Second, "a task whose manager works", func() {
		for off := int64(0); off < other.Size(); off += 65536 {
			if !y.write(1, off, fillBytes(65536, 2)) {
				t.Errorf("offset %d: an error", off)
				return
			}
		}
	})
	if len(s.held) == 0 {
		t.Error("nothing hung: the test shows nothing")
	}
	for len(s.held) > 0 {
		(<-s.held)()
	}
	if n := v.inflight.Load(); n < 0 {
		t.Errorf("%d frames in flight", n)
	}
	s.hold.Store(false)
}

// A manager that stores nothing slows nobody whose manager does: what rests is its objects' alone.
func TestFailingManagerSlowsNobody(t *testing.T) {
	v := newVM(t, 4<<20)
	bad := &shelf{}
	failing := newObject(t, v, ObjectOptions{Size: 2 << 20, Manager: bad, Port: emm.NewPort()})
	other := newObject(t, v, ObjectOptions{Size: 32 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	x.mapObject(failing, 1, 0, failing.Size(), false)
	y.mapObject(other, 1, 0, other.Size(), false)
	for off := int64(0); off < failing.Size(); off += 65536 {
		x.write(1, off, fillBytes(65536, 1))
	}
	bad.fail.Store(true)
	write := func() time.Duration {
		start := time.Now()
		for off := int64(0); off < other.Size(); off += 65536 {
			if !y.write(1, off, fillBytes(65536, 2)) {
				t.Fatalf("offset %d: an error", off)
			}
			if other.failing().pause(time.Now()) {
				t.Fatal("the manager that works rests")
			}
		}
		return time.Since(start)
	}
	slow := write()
	if failing.failing().run.Load() == 0 {
		t.Error("nothing failed: the test shows nothing")
	}
	bad.fail.Store(false)
	if err := failing.PageOut(context.Background(), 0, failing.Size()); err != nil {
		t.Fatal(err)
	}
	fast := write()
	t.Logf("%v beside a manager that fails, %v alone", slow, fast)
	if got := x.read(1, 65536, 65536); !bytes.Equal(got, fillBytes(65536, 1)) {
		t.Error("what could not be stored is lost")
	}
	if len(v.failings.all) != 2 {
		t.Errorf("%d managers are known", len(v.failings.all))
	}
}

// While all return buffers are lent, no dirty page is taken or protected in order to be returned.
func TestNoBufferNoProtection(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	for p := range int64(16) {
		x.write(1, p*4096, []byte("dirty"))
	}
	var loans [64]loan
	var lent [][]byte
	for i := range loans {
		if b, err := v.bufs.tryGet(extentSize, &loans[i]); err == nil {
			lent = append(lent, b)
		}
	}
	before := m.Stats().WriteProtect
	if n := o.evict(0, 16, false); n != 0 {
		t.Errorf("%d frames begun", n)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := o.PageOut(ctx, 0, o.Size()); err == nil {
		t.Error("paged out without a buffer")
	}
	for p := range int64(16) {
		x.write(1, p*4096, []byte("again"))
	}
	if n := m.Stats().WriteProtect - before; n != 0 {
		t.Errorf("%d pages were protected for nothing", n)
	}
	for i, b := range lent {
		v.bufs.put(b, &loans[i])
	}
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	if n := o.lent.n; n != 0 {
		t.Errorf("%d bytes of buffers are still lent", n)
	}
}

// Frames that a punch left are released when they are gone, whatever else is found; what a task put into the file was never reserved.
func TestStuckFrames(t *testing.T) {
	v := newVM(t, 32<<20)
	if !v.frames.Extents() {
		t.Fatal("no large folios here")
	}
	o := newObject(t, v, ObjectOptions{Size: 8 << 20, PageSize: 65536, Manager: &shelf{}, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	// Pages 0 to 31 are one folio, of which somebody holds a page.
	if o.reserve(32) != 32 {
		t.Fatal("no frames")
	}
	if _, err := o.file.WriteAt(make([]byte, 2<<20), 0); err != nil {
		t.Fatal(err)
	}
	for p := range 32 {
		o.words[p].Store(uint64(page.Clean))
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var from int64
	if n, err := unix.Splice(o.file.Fd(), &from, int(w.Fd()), nil, 4096, 0); n != 4096 || err != nil {
		t.Fatal(n, err)
	}
	o.begin(3, page.BeginEvict)
	o.punch(3, 4, false)
	if n := o.stuck.Load(); n != 16 || o.resident.Load() != 32*16 {
		t.Fatalf("%d frames are stuck, %d reserved, want the 16 of a page of which the folio is held", n, o.resident.Load())
	}
	f, err := o.file.Dup()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("foreign"), 4<<20); err != nil {
		t.Fatal(err)
	}
	if freed := o.scrub(); freed == 0 || o.stuck.Load() != 16 || o.resident.Load() != 32*16 {
		t.Errorf("%d foreign frames freed, %d stuck, %d reserved: those that are stuck still are", freed, o.stuck.Load(), o.resident.Load())
	}
	if _, err := unix.Read(int(r.Fd()), make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	o.scrub()
	if o.stuck.Load() != 0 || o.resident.Load() != 31*16 || v.frames.Reserved() != 31*16 {
		t.Errorf("%d frames stuck, %d of the object, %d reserved", o.stuck.Load(), o.resident.Load(), v.frames.Reserved())
	}
}

// A smaller budget comes into force though tasks fill frames as fast as pages go, and one that cannot be had changes nothing.
func TestSetBudgetUnderLoad(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 16 << 20, Manager: s, Port: emm.NewPort()})
	var wg sync.WaitGroup
	var x *task
	var m *Mapping
	for i := range 2 {
		x = startTask(t, v)
		m = x.mapObject(o, 1, 0, o.Size(), false)
		wg.Go(func() {
			if r := x.do(order{Op: "stress", ID: 1, N: o.Size(), Seconds: 2, Seed: 4, Slot: i, Slots: 2, Threads: 4}, nil); r.Wrong > 0 {
				t.Errorf("%d wrong values", r.Wrong)
			}
		})
	}
	time.Sleep(500 * time.Millisecond)
	for _, b := range []int64{12 << 20, 2 << 20, 16 << 20, 1 << 20} {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if err := v.SetBudget(ctx, b); err != nil || v.frames.Budget() != b {
			t.Errorf("a budget of %d: %v; it is %d", b, err, v.frames.Budget())
		}
		cancel()
		if used, err := v.frames.Usage(); used > b && v.frames.Kind() != frames.Memfd {
			t.Errorf("%d bytes in use under a budget of %d, %v", used, b, err)
		}
	}
	wg.Wait()
	if err := v.SetBudget(context.Background(), 8<<20); err != nil {
		t.Fatal(err)
	}
	if err := m.Wire(context.Background(), 0, 4<<20); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := v.SetBudget(ctx, 2<<20); err == nil || v.frames.Budget() != 8<<20 {
		t.Errorf("half of what is wired: %v, the budget is %d", err, v.frames.Budget())
	}
}

// asks looks, when it is asked for contents, whether a snapshot could begin now.
type asks struct {
	shelf
	o      *Object
	held   atomic.Int64
	called atomic.Int64
}

func (s *asks) DataRequest(h emm.Head, want emm.Run, need int64, access emm.Prot) emm.KernReturn {
	if access&emm.ProtWrite != 0 {
		s.called.Add(1)
		if !s.o.freeze.TryLock() {
			s.held.Add(1)
		} else {
			s.o.freeze.Unlock()
		}
	}
	return s.shelf.DataRequest(h, want, need, access)
}

// No lock is held when a manager is asked, also for a write.
func TestAskedWithoutALock(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &asks{}
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: s, Port: emm.NewPort()})
	s.o = o
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	x.write(1, 5*4096, []byte("w"))
	if s.called.Load() == 0 || s.held.Load() != 0 {
		t.Errorf("asked %d times, %d of them with the freeze held", s.called.Load(), s.held.Load())
	}
	if got := x.read(1, 5*4096, 2); !bytes.Equal(got, []byte{'w', 0}) {
		t.Errorf("%q", got)
	}
}

// Objects end though their managers complete nothing, each after its patience, and all of them at the same time; a manager that is only slow is waited for.
func TestEndPatience(t *testing.T) {
	v := newVM(t, 16<<20)
	v.endPatience = 500 * time.Millisecond
	x := startTask(t, v)
	var hung []*holder
	for id := range 12 {
		s := &holder{held: make(chan func(), 64)}
		o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: s, Port: emm.NewPort()})
		x.mapObject(o, id, 0, o.Size(), false)
		x.write(id, 0, []byte("dirty"))
		s.hold.Store(true)
		hung = append(hung, s)
	}
	slow := &holder{held: make(chan func(), 64)}
	slow.hold.Store(true)
	o := newObject(t, v, ObjectOptions{Size: 256 * 4096, Manager: slow, Port: emm.NewPort()})
	m := x.mapObject(o, 20, 0, o.Size(), false)
	for p := int64(0); p < 256; p += 16 {
		x.write(20, p*4096, []byte("taken"))
	}
	m.Close()
	go func() {
		for range 16 {
			complete := <-slow.held
			time.Sleep(100 * time.Millisecond)
			complete()
		}
	}()
	o.Terminate()
	slow.mu.Lock()
	if len(slow.pages) != 16 {
		t.Errorf("a slow manager was given %d pages of 16", len(slow.pages))
	}
	slow.mu.Unlock()
	well := &shelf{}
	o = newObject(t, v, ObjectOptions{Size: 4096, Manager: well, Port: emm.NewPort()})
	x.mapObject(o, 21, 0, o.Size(), false)
	x.write(21, 0, []byte("dirty"))
	ends(t, 5*time.Second, "Close", v.Close) // one after the other they would take 6
	if b := well.pages[0]; !bytes.HasPrefix(b, []byte("dirty")) {
		t.Error("a manager that works was not given what is its, because others keep all buffers")
	}
	for _, s := range hung {
		for len(s.held) > 0 {
			(<-s.held)()
		}
	}
}

// One task cannot wire all that can be wired.
func TestTaskWired(t *testing.T) {
	v := newVM(t, 4<<20)
	o := newObject(t, v, ObjectOptions{Size: 8 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	m, n := x.mapObject(o, 1, 0, o.Size(), false), x.mapObject(o, 2, 0, o.Size(), false)
	other := y.mapObject(o, 1, 0, o.Size(), false)
	ctx := context.Background()
	if err := m.Wire(ctx, 0, 2<<20); err != nil {
		t.Fatal(err)
	}
	if err := n.Wire(ctx, 4<<20, 1<<20); !errors.Is(err, emm.ResourceShortage) {
		t.Errorf("3 MiB of 4 wired by one task: %v", err)
	}
	if got := x.Task.wired.Load(); got != 512 {
		t.Errorf("%d frames count for the task", got)
	}
	if err := other.Wire(ctx, 4<<20, 1<<20); err != nil {
		t.Errorf("another task: %v", err)
	}
	if err := m.Wire(ctx, 0, 4096); err != nil {
		t.Errorf("what it has wired already: %v", err)
	}
	if err := m.Unwire(0, 4096); err != nil {
		t.Error(err)
	}
	if err := m.Unwire(0, 1<<20); err != nil {
		t.Error(err)
	}
	if err := n.Wire(ctx, 2<<20, 1<<20); err != nil {
		t.Errorf("after unwiring: %v", err)
	}
	m.Close()
	n.Close()
	if a, b := x.Task.wired.Load(), v.wired.Load(); a != 0 || b != 256 {
		t.Errorf("%d frames count for a task without mappings, %d are wired in all, want 0 and the other's 256", a, b)
	}
}

// An object that makes room among its own pages takes those first that were advised not to be needed.
func TestResidentMaxObeysAdvice(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, ResidentMax: 64 * 4096, Manager: &shelf{}, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	if err := m.Advise(0, o.Size(), Random); err != nil {
		t.Fatal(err)
	}
	for p := range int64(48) {
		x.write(1, p*4096, []byte{1})
	}
	if err := m.Advise(20*4096, 24*4096, DontNeed); err != nil {
		t.Fatal(err)
	}
	for p := int64(100); p < 116; p++ { // as many as make the daemon look, and no more than were given up
		x.write(1, p*4096, []byte{1})
	}
	for deadline := time.Now().Add(5 * time.Second); o.resident.Load() > 60 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	gone := 0
	for p := range int64(48) {
		switch there := o.word(p).Resident(); {
		case !there && (p < 20 || p >= 44):
			t.Errorf("page %d has gone before those that were advised", p)
		case !there:
			gone++
		}
	}
	if gone == 0 {
		t.Error("nothing has gone: the test shows nothing")
	}
}

// To throw away a part of a huge object takes as long as what was ever there of it, in memory or with the manager.
func TestDiscardOfAHugeObject(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 1 << 40, Fresh: true, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	at := []int64{0, 1 << 30, 1<<39 + 8192, 1<<40 - 4096}
	for _, off := range at {
		x.write(1, off, []byte("here"))
	}
	if err := o.PageOut(context.Background(), at[2], 4096); err != nil { // the manager alone has it
		t.Fatal(err)
	}
	ends(t, 10*time.Second, "SetSize", func() {
		if err := o.SetSize(context.Background(), 4096); err != nil {
			t.Error(err)
		}
		if err := o.SetSize(context.Background(), 1<<40); err != nil {
			t.Error(err)
		}
	})
	for i, off := range at {
		want := make([]byte, 4)
		if i == 0 {
			want = []byte("here")
		}
		if got := x.read(1, off, 4); !bytes.Equal(got, want) {
			t.Errorf("at %d: %q, want %q", off, got, want)
		}
	}
}
