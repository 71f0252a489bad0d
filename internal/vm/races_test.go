package vm

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// ends fails the test if fn does not return in time.
func ends(t *testing.T, d time.Duration, what string, fn func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); fn() }()
	select {
	case <-done:
	case <-time.After(d):
		t.Fatalf("%s does not end", what)
	}
}

// holder is a shelf that completes returns only when it is told to.
type holder struct {
	shelf
	held   chan func() // a completion each
	hold   atomic.Bool
	result emm.KernReturn // of the completions; Success
}

func (s *holder) DataReturn(h emm.Head, off int64, data []byte, dirty, kernelCopy bool) emm.KernReturn {
	if !s.hold.Load() {
		return s.shelf.DataReturn(h, off, data, dirty, kernelCopy)
	}
	s.mu.Lock()
	for i := int64(0); i < int64(len(data)); i += s.size {
		s.pages[off+i] = bytes.Clone(data[i : i+s.size])
	}
	s.mu.Unlock()
	n := int64(len(data))
	s.held <- func() { h.Control.ReturnCompleted(emm.Run{Off: off, Size: n}, s.result) }
	return emm.Success
}

func (s *holder) DataInitialize(h emm.Head, off int64, data []byte) emm.KernReturn {
	return s.DataReturn(h, off, data, true, false)
}

// One thread may have several faults put aside (a signal ended the wait for the first). None is lost when the first one makes it the token's holder.
func TestDeferredFaultsOfOneThread(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	v.token.pressed()
	v.deferMu.Lock()
	for p := range int64(3) {
		v.deferred = append(v.deferred, deferredFault{m: m, p: p, f: faulter{ev: page.FaultRead, tid: 7, start: time.Now()}, wanted: 1})
		v.wanted.Add(1)
	}
	v.deferMu.Unlock()
	v.retryDeferred(false)
	for p := range int64(3) {
		if w := o.word(p); w.State() != page.Clean {
			t.Errorf("page %d: %v: its fault was lost", p, w)
		}
	}
}

// A task may divide its mapping into several areas of the kernel's (madvise, mlock, mprotect): what is filled or mapped at once may lie in two of them.
func TestMappingOfSeveralAreas(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, ClusterSize: 65536, Manager: s, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(o, 1, 0, o.Size(), false)
	x.do(order{Op: "split", ID: 1, Off: 8 * 4096, N: 3 * 4096}, nil)
	y.do(order{Op: "split", ID: 1, Off: 8 * 4096, N: 3 * 4096}, nil)
	for _, p := range []int64{9, 0, 15} {
		if !x.write(1, p*4096, []byte{byte(p + 1)}) {
			t.Fatalf("page %d: no write", p)
		}
	}
	for _, p := range []int64{15, 9, 0} {
		if got := y.read(1, p*4096, 1); len(got) != 1 || got[0] != byte(p+1) {
			t.Fatalf("page %d: %v", p, got)
		}
	}
	// A part that is gone takes nothing else with it.
	o2 := newObject(t, v, ObjectOptions{Size: 1 << 20, ClusterSize: 65536, Manager: &shelf{}, Port: emm.NewPort()})
	m := x.mapObject(o2, 2, 0, o2.Size(), false)
	y.mapObject(o2, 2, 0, o2.Size(), false)
	x.do(order{Op: "hole", ID: 2, Off: 2 * 4096, N: 4096}, nil)
	for _, p := range []int64{9, 0, 15} {
		if !x.write(2, p*4096, []byte{byte(p + 1)}) {
			t.Fatalf("page %d: no write", p)
		}
	}
	y.write(2, 16*4096+5, []byte("y"))
	x.do(order{Op: "hole", ID: 2, Off: 16 * 4096, N: 4096}, nil)
	if got := x.read(2, 17*4096, 1); len(got) != 1 {
		t.Fatal("no read beside a hole")
	}
	ends(t, 5*time.Second, "populate", func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if err := m.Populate(ctx, 20*4096, 16*4096, true); err != nil {
			t.Error(err)
		}
	})
}

// While a page is being cleaned its mapping moves: it must be protected where it is now.
func TestMovedWhileCleaned(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &holder{held: make(chan func(), 8)}
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: s, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(o, 1, 0, o.Size(), false)
	x.write(1, 0, []byte("before"))
	s.hold.Store(true)
	x.Task.drainMu.Lock() // so that the event stays unread
	moved := make(chan struct{})
	go func() { x.do(order{Op: "remap", ID: 1, Off: 0, N: 65536}, nil); close(moved) }()
	time.Sleep(100 * time.Millisecond)
	out := make(chan error, 1)
	go func() { out <- o.PageOut(context.Background(), 0, 4096) }()
	time.Sleep(50 * time.Millisecond)
	x.Task.drainMu.Unlock()
	<-moved
	complete := <-s.held // the contents have been read
	wrote := make(chan struct{})
	go func() { x.write(101, 0, []byte("after!")); close(wrote) }()
	time.Sleep(50 * time.Millisecond)
	s.hold.Store(false)
	complete()
	if err := <-out; err != nil {
		t.Fatal(err)
	}
	<-wrote
	if got := y.read(1, 0, 6); string(got) != "after!" {
		t.Fatalf("%q: a write is lost", got)
	}
}

// Contents that are lost for ever stay so; Discard passes by, and does the rest.
func TestDiscardWhatIsLost(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	x.write(1, 8192, []byte("gone"))
	s.forget.Store(true)
	lost := make(chan bool)
	go func() { lost <- x.read(1, 4096, 1) == nil }()
	for o.word(1).State() != page.Requested {
		time.Sleep(time.Millisecond)
	}
	s.ctl.DataError(emm.Run{Size: o.Size()}, emm.MemoryFailure) // also of what was asked for ahead
	if !<-lost {
		t.Fatal("no error")
	}
	s.forget.Store(false)
	ends(t, 5*time.Second, "discard", func() {
		if err := o.Discard(context.Background(), 0, o.Size()); err != nil {
			t.Error(err)
		}
	})
	if got := x.read(1, 8192, 4); !bytes.Equal(got, make([]byte, 4)) {
		t.Errorf("discarded: %q", got)
	}
	if x.read(1, 4096, 1) != nil {
		t.Error("what is lost for ever has come back")
	}
}

// A page in Error that is asked for and filled by somebody else meanwhile is left alone, and not left Busy.
func TestErrorPageIsTakenOnce(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 4096, Manager: &shelf{}, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	for end, i := time.Now().Add(500*time.Millisecond), 0; time.Now().Before(end); i++ {
		o.words[0].Store(uint64(page.Error))
		o.reserve(1)
		var wg sync.WaitGroup
		wg.Go(func() { // somebody who faults, and is answered
			if _, _, eff := o.step(0, page.FaultRead); eff == page.Request {
				o.finish(0, page.SupplyRead)
			}
		})
		took := false
		wg.Go(func() { took = o.takeAny(0) })
		wg.Wait()
		if w := o.word(0); w.Busy() {
			t.Fatalf("round %d: the page is left %v", i, w)
		} else if took {
			o.finish(0, map[page.State]page.Event{page.Cleaning: page.Stored, page.Evicting: page.Punched}[w.State()])
		}
		o.release(1)
	}
	o.words[0].Store(0)
}

func TestTerminateTwice(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	for range 3 {
		o.Terminate()
	}
}

// The end of an object does not wait for a manager that does not complete a return, whoever else waits for it; and what it holds is not counted as on its way.
func TestTerminateWhileReturning(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &holder{held: make(chan func(), 8)}
	v.SetDefaultManager(s)
	o := newObject(t, v, ObjectOptions{Size: 1 << 20})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	for p := range int64(4) {
		x.write(1, p*4096, []byte("x"))
	}
	s.hold.Store(true)
	all := int64(16 << 20 / 4096)
	v.wanted.Add(all)
	v.kickNow()
	for v.inflight.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	v.wanted.Add(-all)
	x.write(1, 8*4096, []byte("x"))
	var wg sync.WaitGroup
	wg.Go(func() { o.PageOut(context.Background(), 0, o.Size()) })  // waits for what the daemon has begun
	wg.Go(func() { o.PageOut(context.Background(), 8*4096, 4096) }) // waits for the manager
	time.Sleep(50 * time.Millisecond)
	m.Close()
	ends(t, 5*time.Second, "Terminate", o.Terminate)
	ends(t, 5*time.Second, "PageOut", wg.Wait)
	if n := v.inflight.Load(); n != 0 {
		t.Errorf("%d frames in flight after the object's end", n)
	}
	for len(s.held) > 0 {
		(<-s.held)()
	}
	if n := v.inflight.Load(); n != 0 {
		t.Errorf("%d frames in flight after late completions", n)
	}
	if n := o.lent.n; n != 0 {
		t.Errorf("%d buffers still lent", n)
	}
}

// A manager that leaves what was advised unanswered does not keep a mapping from closing.
func TestCloseWhileAdvised(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	s.forget.Store(true)
	if err := m.Advise(0, o.Size(), WillNeed); err != nil {
		t.Fatal(err)
	}
	populated := make(chan error, 1)
	go func() { populated <- m.Populate(context.Background(), 0, o.Size(), false) }()
	for o.word(0).State() != page.Requested {
		time.Sleep(time.Millisecond)
	}
	ends(t, 5*time.Second, "Close", m.Close)
	if err := <-populated; err == nil {
		t.Error("populated")
	}
}

// A page of several frames whose fill with zeros for a write stopped half way, or that a task punched a part out of: what is there was written, and stays.
func TestPartOfAPage(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, PageSize: 65536})
	x, y := startTask(t, v), startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(o, 1, 0, o.Size(), false)
	x.write(1, 0, []byte("first"))
	if _, err := o.file.Punch(32768, 4096); err != nil {
		t.Fatal(err)
	}
	if got := y.read(1, 32768, 4); !bytes.Equal(got, make([]byte, 4)) {
		t.Fatalf("%q", got)
	}
	if got := y.read(1, 0, 5); string(got) != "first" {
		t.Fatalf("%q: the part that is there is overwritten", got)
	}
}

// A page that is chosen as a victim between its fill and the end of Requested is not forgotten by the policy.
func TestVictimWhileFilled(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 4096, Manager: &shelf{}, Port: emm.NewPort()})
	o.words[0].Store(uint64(page.Requested))
	v.policy.Fill(o.frameRun(0, 1), 1, -1)
	all := int64(16<<20/4096) + 1
	v.wanted.Add(all)
	v.kickNow()
	time.Sleep(50 * time.Millisecond)
	v.wanted.Add(-all)
	if n := v.policy.Stats().Resident; n != 1 {
		t.Errorf("%d frames resident as the policy knows", n)
	}
	o.words[0].Store(0)
}
