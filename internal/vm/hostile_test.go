package vm

import (
	"bytes"
	"context"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/frames"
	"machpager/pager/emm"
)

func TestMemfdFrames(t *testing.T) {
	frameKind = frames.Memfd
	defer func() { frameKind = 0 }()
	t.Run("fault", func(t *testing.T) { faultPageOutFault(t, false) })
	t.Run("error", TestErrorHealsAndAsksAgain)
}

// Pages that a task with write access takes out of the file, or puts there by its own hand, are its own loss: nobody else's, and no hang.
func TestTaskMeddlesWithItsFile(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 4 << 20, Manager: s, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(o, 1, 0, o.Size(), false)
	f, err := o.file.Dup() // what a rogue task kept of it
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	punch := func(off, n int64) {
		t.Helper()
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n); err != nil {
			t.Fatal(err)
		}
	}
	stored := fillBytes(4096, 3)
	x.write(1, 8192, stored)
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	// A clean page, punched: the manager has it.
	if got := y.read(1, 8192, 4096); !bytes.Equal(got, stored) {
		t.Fatal("wrong bytes")
	}
	punch(8192, 4096)
	if got := x.read(1, 8192, 4096); !bytes.Equal(got, stored) {
		t.Fatal("a clean page that was punched does not come back")
	}
	punch(8192, 4096)
	x.write(1, 8192, []byte("W"))
	if got := y.read(1, 8192, 4096); got[0] != 'W' || !bytes.Equal(got[1:], stored[1:]) {
		t.Fatal("a clean page that was punched and written is wrong")
	}
	// A dirty page, punched: gone.
	punch(8192, 4096)
	if got := y.read(1, 8192, 4096); !bytes.Equal(got, make([]byte, 4096)) {
		t.Fatal("a dirty page that was punched is not zeros")
	}
	if v.Stats().ThrownAway != 1 {
		t.Errorf("%+v", v.Stats())
	}
	// Something lies in the file where nothing should: the manager's contents count.
	x.write(1, 8192, stored)
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("foreign"), 8192); err != nil {
		t.Fatal(err)
	}
	if got := y.read(1, 8192, 4096); !bytes.Equal(got, stored) {
		t.Fatal("foreign bytes are seen")
	}
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("foreign"), 8192); err != nil {
		t.Fatal(err)
	}
	x.write(1, 8192, []byte("X"))
	if got := y.read(1, 8192, 4096); got[0] != 'X' || !bytes.Equal(got[1:], stored[1:]) {
		t.Fatal("foreign bytes are seen behind a write")
	}
	// Truncated to nothing: SIGBUS for who touches it, and no harm to the vm.
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if x.read(1, 8192, 1) != nil {
		t.Fatal("no SIGBUS beyond the end of the file")
	}
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Logf("page-out of a truncated file: %v", err)
	}
	f.Truncate(o.Size())
	x.read(1, 1<<20, 1)
	if b := m.Stats(); b.Errors != 0 {
		t.Errorf("%+v", b)
	}
	// Frames filled by a task's hand are found when they are missed.
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
}

func TestForeignFramesAreReclaimed(t *testing.T) {
	v := newVM(t, 4<<20)
	o := newObject(t, v, ObjectOptions{Size: 32 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	f, err := o.file.Dup()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 16<<20, 4<<20); err != nil {
		t.Logf("fallocate: %v", err) // some of it is enough
	}
	for off := int64(0); off < 3<<20; off += 4096 {
		if !x.write(1, off, []byte{1}) {
			t.Fatalf("offset %d: error", off)
		}
	}
	if v.counters.scrubbed.Load() == 0 && v.frames.Kind() != frames.Memfd {
		t.Error("nothing was scrubbed")
	}
}

func TestRemapIsFollowed(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 4 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	told := make(chan []Span, 8)
	v.told = func(_ *Task, _ uint64, s []Span) { told <- s }
	x, y := startTask(t, v), startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(o, 1, 0, o.Size(), false)
	b := fillBytes(3<<20, 9)
	x.write(1, 0, b[:65536])
	x.write(1, 1<<20, b[:65536])
	to := x.do(order{Op: "remap", ID: 1, Off: 1 << 20, N: 1 << 20}, nil).Addr
	select {
	case s := <-told: // whoever answers for its ranges when this process cannot
		if !slices.Equal(s, m.Spans()) || !slices.Contains(s, Span{to, 1 << 20, 1 << 20}) {
			t.Errorf("told %+v, it is at %+v", s, m.Spans())
		}
	case <-time.After(5 * time.Second):
		t.Error("nobody was told")
	}
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	if got := y.read(1, 1<<20, 65536); !bytes.Equal(got, b[:65536]) {
		t.Fatal("what was moved is wrong in another task")
	}
	if got := x.read(1, 0, 65536); !bytes.Equal(got, b[:65536]) {
		t.Fatal("what was not moved is wrong")
	}
	if got := x.read(101, 0, 65536); !bytes.Equal(got, b[:65536]) {
		t.Fatal("what was moved is wrong where it is now")
	}
	x.write(101, 70000, []byte("moved"))
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	if got := y.read(1, 1<<20+70000, 5); string(got) != "moved" {
		t.Fatalf("written where it is now: %q", got)
	}
	if len(*x.Task.spans.Load()) != 3 {
		t.Errorf("spans: %+v", *x.Task.spans.Load())
	}
}

func TestManagerDestroysObject(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 4 << 20, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	x.write(1, 0, []byte("soon lost"))
	s.forget.Store(true)
	blocked := make(chan bool)
	go func() { blocked <- x.read(1, 1<<20, 1) == nil }()
	time.Sleep(50 * time.Millisecond)
	if kr := s.ctl.Destroy(emm.Failure); kr != emm.Success {
		t.Fatal(kr)
	}
	select {
	case err := <-blocked:
		if !err {
			t.Error("the thread that waited got contents")
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the thread that waited still waits")
	}
	for deadline := time.Now().Add(5 * time.Second); x.read(1, 0, 1) != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("contents of a destroyed object are seen")
		}
	}
	if err := m.FaultReason(0); err != emm.MemoryFailure {
		t.Error(err)
	}
	if kr := s.ctl.DataUnavailable(emm.Run{Off: 0, Size: 4096}); kr != emm.InvalidArgument && kr != emm.Success {
		t.Error(kr)
	}
}

func TestKilledTask(t *testing.T) {
	v := newVM(t, 16<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 4 << 20, Manager: s, Port: emm.NewPort()})
	y := startTask(t, v)
	y.mapObject(o, 1, 0, o.Size(), false)
	for range 20 {
		x := startTask(t, v)
		x.mapObject(o, 1, 0, o.Size(), false)
		x.write(1, 0, []byte("survives"))
		s.forget.Store(true)
		go func() {
			defer func() { recover() }()
			x.conn.Write([]byte(`{"Op":"read","ID":1,"Off":1048576,"N":1}`))
		}()
		time.Sleep(5 * time.Millisecond)
		x.cmd.Process.Kill()
		x.cmd.Process.Wait()
		s.forget.Store(false)
		x.Task.Close()
		s.ctl.DataUnavailable(emm.Run{Off: 1 << 20, Size: 4096})
		if got := y.read(1, 0, 8); string(got) != "survives" {
			t.Fatalf("%q", got)
		}
	}
	if got := y.read(1, 1<<20, 1); !bytes.Equal(got, []byte{0}) {
		t.Fatal("the page that the dead task had asked for")
	}
}

func TestSetSize(t *testing.T) {
	v := newVM(t, 16<<20)
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	ctx := context.Background()
	x.write(1, 0, fillBytes(1<<16, 1))
	x.write(1, 1<<19, fillBytes(1<<16, 2))
	if err := o.PageOut(ctx, 1<<19, 8192); err != nil {
		t.Fatal(err)
	}
	if err := o.SetSize(ctx, 1<<19-1000); err != nil {
		t.Fatal(err)
	}
	if x.read(1, 1<<19, 1) != nil || x.read(1, 1<<20-1, 1) != nil {
		t.Fatal("a touch beyond the end succeeded")
	}
	if err := m.FaultReason(1 << 19); err != emm.MemoryError {
		t.Fatal(err)
	}
	if got := x.read(1, 0, 1<<16); !bytes.Equal(got, fillBytes(1<<16, 1)) {
		t.Fatal("contents before the end are wrong")
	}
	if err := o.SetSize(ctx, 1<<20+1); err == nil {
		t.Fatal("grew beyond what it was made with")
	}
	if err := o.SetSize(ctx, 1<<20); err != nil {
		t.Fatal(err)
	}
	x.do(order{Op: "drop", ID: 1, Off: 1 << 19, N: 1 << 19}, nil)
	if got := x.read(1, 1<<19, 1<<16); !bytes.Equal(got, make([]byte, 1<<16)) {
		t.Fatal("what was cut off has come back")
	}
}
