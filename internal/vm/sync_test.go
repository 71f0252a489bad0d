package vm

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// syncShelf is a shelf that synchronises as onSync says.
type syncShelf struct {
	shelf
	smu    sync.Mutex
	onSync func(h emm.Head, r emm.Run) emm.KernReturn // guarded by smu
	runs   []emm.Run                                  // guarded by smu
}

func (s *syncShelf) Synchronize(h emm.Head, r emm.Run, f emm.SyncFlags) emm.KernReturn {
	s.smu.Lock()
	s.runs = append(s.runs, r)
	on := s.onSync
	s.smu.Unlock()
	if f != emm.SyncSynchronous {
		return emm.InvalidArgument
	}
	return on(h, r)
}

func (s *syncShelf) set(on func(h emm.Head, r emm.Run) emm.KernReturn) {
	s.smu.Lock()
	defer s.smu.Unlock()
	s.onSync = on
}

func completes(h emm.Head, r emm.Run) emm.KernReturn { return h.Control.SynchronizeCompleted(r) }
func forgets(emm.Head, emm.Run) emm.KernReturn       { return emm.Success }

// within is a context that no wait may exceed.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func (s *shelf) page(off int64) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pages[off]
}

// What is dirty is returned and stays; what is written later is dirty again.
func TestSync(t *testing.T) {
	v := newVM(t, 4<<20)
	s := &syncShelf{onSync: completes}
	o := newObject(t, v, ObjectOptions{Size: 64 << 10, Manager: s, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(o, 1, 0, o.Size(), false)
	for i := byte(1); i <= 3; i++ {
		want := fillBytes(3*4096, i)
		x.write(1, 8192, want)
		if err := o.Sync(within(t, 10*time.Second), 8193, 2*4096); err != nil { // rounded outward: three pages
			t.Fatal(err)
		}
		for p := range int64(3) {
			if !bytes.Equal(s.page(8192+p*4096), want[p*4096:][:4096]) {
				t.Fatalf("page %d was not returned", p)
			}
		}
		for p := int64(2); p < 5; p++ {
			if w := o.word(p); w.State() != page.Clean {
				t.Fatalf("page %d is %v", p, w)
			}
		}
		if got := y.read(1, 8192, 3*4096); !bytes.Equal(got, want) {
			t.Fatal("wrong bytes after sync")
		}
	}
	if err := o.Sync(within(t, 10*time.Second), 0, o.Size()); err != nil { // pages that were made writable ahead of the writes
		t.Fatal(err)
	}
	returned := o.Stats().Returned
	if err := o.Sync(within(t, 10*time.Second), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	if n := o.Stats().Returned - returned; n != 0 {
		t.Errorf("%d clean pages were returned", n)
	}
	s.smu.Lock()
	defer s.smu.Unlock()
	if want := (emm.Run{Off: 8192, Size: 3 * 4096}); len(s.runs) != 5 || s.runs[0] != want || s.runs[3] != (emm.Run{Off: 0, Size: o.Size()}) {
		t.Errorf("%+v", s.runs)
	}
}

// Without a Synchronizer the vm completes; an object without a manager has nothing to be synchronised, or gets the default one.
func TestSyncDefault(t *testing.T) {
	v := newVM(t, 4<<20)
	v.SetDefaultManager(&shelf{})
	for _, opt := range []ObjectOptions{{Size: 8192}, {Size: 8192, Manager: &shelf{}, Port: emm.NewPort()}} {
		o := newObject(t, v, opt)
		x := startTask(t, v)
		x.mapObject(o, 1, 0, o.Size(), false)
		for range 2 {
			if err := o.Sync(within(t, 10*time.Second), 0, o.Size()); err != nil {
				t.Fatal(err)
			}
			x.write(1, 0, []byte("x"))
		}
		if o.Stats().Returned < 1 {
			t.Errorf("%+v", o.Stats())
		}
	}
}

// An error of the manager is the caller's, whichever way it comes, and what was not taken is still dirty.
func TestSyncErrors(t *testing.T) {
	v := newVM(t, 4<<20)
	s := &syncShelf{}
	o := newObject(t, v, ObjectOptions{Size: 8192, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	ctx := within(t, 20*time.Second)
	for name, on := range map[string]func(h emm.Head, r emm.Run) emm.KernReturn{
		"refused": func(emm.Head, emm.Run) emm.KernReturn { return emm.NoSpace },
		"at once": func(h emm.Head, r emm.Run) emm.KernReturn { return h.Control.SynchronizeError(r, emm.NoSpace) },
		"later": func(h emm.Head, r emm.Run) emm.KernReturn {
			go h.Control.SynchronizeError(r, emm.NoSpace)
			return emm.Success
		},
		"nonsense": func(h emm.Head, r emm.Run) emm.KernReturn { return h.Control.SynchronizeError(r, emm.Success) },
	} {
		s.set(on)
		want := emm.NoSpace
		if name == "nonsense" {
			want = emm.Failure
		}
		if err := o.Sync(ctx, 0, 4096); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s.set(completes)
	x.write(1, 0, []byte("dirty"))
	s.fail.Store(true)
	if err := o.Sync(ctx, 0, 4096); !errors.Is(err, emm.Failure) {
		t.Errorf("a return that failed: %v", err)
	}
	if st := m.Stats(); st.Dirty != 1 {
		t.Errorf("%+v", st)
	}
	s.fail.Store(false)
	if err := o.Sync(ctx, 0, 4096); err != nil {
		t.Error(err)
	}
	for _, r := range [][2]int64{{-1, 1}, {0, 8193}, {8193, 0}, {0, -1}, {1 << 62, 1 << 62}} {
		if err := o.Sync(ctx, r[0], r[1]); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("%v: %v", r, err)
		}
	}
	c := o.control
	for _, r := range []emm.Run{{Off: 1, Size: 4096}, {Off: 0, Size: 0}, {Off: -4096, Size: 4096}} {
		if kr := c.SynchronizeCompleted(r); kr != emm.InvalidArgument {
			t.Errorf("completed %+v: %v", r, kr)
		}
	}
	before := v.Stats().Unasked
	if kr := c.SynchronizeCompleted(emm.Run{Off: 0, Size: 4096}); kr != emm.Success || v.Stats().Unasked != before+1 {
		t.Errorf("an answer that nobody waits for: %v", kr)
	}
}

// An answer is for exactly one range, the oldest of those that are alike, also if its caller has gone.
func TestSyncAnswers(t *testing.T) {
	v := newVM(t, 4<<20)
	s := &syncShelf{onSync: forgets}
	o := newObject(t, v, ObjectOptions{Size: 8 * 4096, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	if err := o.Sync(within(t, 20*time.Millisecond), 0, 4096); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	done := make(chan error, 2)
	begin := func(off, n int64) {
		o.syncs.mu.Lock()
		before := len(o.syncs.out)
		o.syncs.mu.Unlock()
		go func() { done <- o.Sync(within(t, 10*time.Second), off, n) }()
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			o.syncs.mu.Lock()
			n := len(o.syncs.out)
			o.syncs.mu.Unlock()
			if n > before {
				return
			}
		}
		t.Fatal("no message")
	}
	answered := func() bool {
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return true
		case <-time.After(50 * time.Millisecond):
			return false
		}
	}
	begin(0, 4096)
	c := o.control
	c.SynchronizeCompleted(emm.Run{Off: 0, Size: 8192}) // of nobody
	c.SynchronizeCompleted(emm.Run{Off: 4096, Size: 4096})
	c.SynchronizeCompleted(emm.Run{Off: 0, Size: 4096}) // of the one who has gone
	if answered() {
		t.Fatal("an answer to somebody else was taken")
	}
	c.SynchronizeCompleted(emm.Run{Off: 0, Size: 4096})
	if !answered() {
		t.Fatal("not answered")
	}
	// Too many unanswered ones: later ones wait.
	for range MaxRequests {
		o.Sync(within(t, time.Millisecond), 4096, 4096)
	}
	if err := o.Sync(within(t, 20*time.Millisecond), 0, 4096); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	if n := len(o.syncs.out); n > MaxRequests {
		t.Errorf("%d are out", n)
	}
}

// The end of an object ends who waits for its manager, and is not kept by them.
func TestSyncAtTheEnd(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(o *Object)
		want emm.KernReturn
	}{
		"terminate": {func(o *Object) { o.Terminate() }, emm.InvalidObject},
		"destroy":   {func(o *Object) { o.control.Destroy(emm.Failure) }, emm.MemoryFailure},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVM(t, 4<<20)
			s := &syncShelf{onSync: forgets}
			o := newObject(t, v, ObjectOptions{Size: 8192, Manager: s, Port: emm.NewPort()})
			done := make(chan error)
			const waiting = MaxRequests + 5 // some of them wait to be sent
			for i := range int64(waiting) {
				go func() { done <- o.Sync(within(t, 20*time.Second), i%2*4096, 4096) }()
			}
			time.Sleep(50 * time.Millisecond)
			c.end(o)
			for range waiting {
				if err := <-done; !errors.Is(err, c.want) {
					t.Error(err)
				}
			}
			if err := o.Sync(within(t, 10*time.Second), 0, 4096); !errors.Is(err, c.want) {
				t.Error(err)
			}
		})
	}
}

// A page that is asked for, and never comes, is nothing that could be synchronised.
func TestSyncPassesRequests(t *testing.T) {
	v := newVM(t, 4<<20)
	s := &syncShelf{onSync: completes}
	o := newObject(t, v, ObjectOptions{Size: 8192, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	x.write(1, 4096, []byte("dirty"))
	s.forget.Store(true)
	ctx, cancel := context.WithCancel(context.Background())
	populated := make(chan error)
	go func() { populated <- m.Populate(ctx, 0, 4096, false) }()
	for end := time.Now().Add(10 * time.Second); o.word(0).State() == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if err := o.Sync(within(t, 10*time.Second), 0, o.Size()); err != nil {
		t.Error(err)
	}
	if b := s.page(4096); !bytes.HasPrefix(b, []byte("dirty")) {
		t.Error("not returned")
	}
	cancel()
	<-populated
	s.forget.Store(false)
	s.ctl.DataUnavailable(emm.Run{Off: 0, Size: 4096})
}
