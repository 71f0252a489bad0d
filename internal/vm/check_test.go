package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// problems are what Check finds.
func problems(t *testing.T, v *VM) (list []Problem, c Checked) {
	t.Helper()
	c, err := v.Check(context.Background(), func(p Problem) { list = append(list, p) })
	if err != nil {
		t.Fatal(err)
	}
	return list, c
}

// Check finds nothing in a vm under load, of which most pages are in motion.
func TestCheckLive(t *testing.T) {
	v := newVM(t, 2<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 8 << 20, Manager: s, Port: emm.NewPort()})
	x, y := startTask(t, v), startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	y.mapObject(o, 1, 0, o.Size(), false)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for i, z := range []*task{x, y} {
		wg.Go(func() {
			if r := z.do(order{Op: "stress", ID: 1, N: o.Size(), Seconds: 0.7, Seed: uint64(i), Slot: i, Slots: 2, Threads: 2}, nil); r.Wrong > 0 {
				t.Errorf("%d wrong", r.Wrong)
			}
		})
	}
	go func() { wg.Wait(); close(done) }()
	looks := 0
	for running := true; running; looks++ {
		select {
		case <-done:
			running = false // once more, when all is quiet
		default:
		}
		list, c := problems(t, v)
		if len(list) > 0 {
			t.Fatalf("look %d: %+v", looks, list)
		}
		if d := v.Dump(); len(d.Objects) != 1 || len(d.Tasks) != 2 || len(d.Tasks[0].Mappings) != 1 {
			t.Fatalf("look %d: %+v", looks, d)
		}
		if !running && (c.Objects != 1 || c.Resident == 0 || c.Unsettled+int64(c.Uncounted) > 0) {
			t.Errorf("when all was quiet: %+v", c)
		}
	}
	t.Logf("%d looks", looks)
}

// Check finds each thing that is broken for it, and says where.
func TestCheckFinds(t *testing.T) {
	v := newVM(t, 4<<20)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 1 << 20, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	x.write(1, 0, fillBytes(8*4096, 1))
	if err := o.PageOut(context.Background(), 0, o.Size()); err != nil {
		t.Fatal(err)
	}
	x.read(1, 0, 8*4096)
	x.write(1, 5*4096, []byte("dirty"))
	if err := m.Wire(context.Background(), 0, 4096); err != nil {
		t.Fatal(err)
	}
	defer m.Unwire(0, 4096)
	if list, c := problems(t, v); len(list) > 0 || c.Resident < 8 || c.Empty != 0 {
		t.Fatalf("before anything is broken: %+v, %+v", list, c)
	}
	allocate := func(mode uint32, p int64) {
		if err := unix.Fallocate(o.file.Fd(), mode|unix.FALLOC_FL_KEEP_SIZE, p*4096, 4096); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name          string
		break_, heal  func()
		want          string
		off           int64 // -2: any
		empty         int64
		kernelCounted bool // the kernel's count shows it too
	}{
		{"a clean page is punched", func() { allocate(unix.FALLOC_FL_PUNCH_HOLE, 2) }, func() { x.read(1, 2*4096, 1) }, "the page is Clean, but of its 4096 bytes 0", 2 * 4096, 0, false},
		{"a dirty page is punched", func() { allocate(unix.FALLOC_FL_PUNCH_HOLE, 5) }, func() { x.read(1, 5*4096, 1) }, "", 0, 1, false},
		{"a frame lies under an absent page", func() { allocate(0, 100) }, func() { v.scrub() }, "frames lie in its file under pages that are absent", -2, 0, true},
		{"a frame is reserved for nothing", func() { o.reserve(1) }, func() { o.release(1) }, "frames are reserved for it, and its page table accounts for", -1, 0, false},
		{"a frame was given back twice", func() { v.frames.Release(1) }, func() { v.frames.Reserve(1) }, "frames are reserved, and the objects together have", -1, 0, true},
		{"a page is wired and not counted", func() { o.step(3, page.Wire) }, func() { o.step(3, page.Unwire) }, "frames are counted as wired, and its page table has", -1, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.break_()
			list, got := problems(t, v)
			c.heal()
			if got.Empty != c.empty {
				t.Errorf("%d empty pages, want %d", got.Empty, c.empty)
			}
			if c.kernelCounted {
				last := list[max(0, len(list)-1):]
				if len(last) == 0 || !strings.Contains(last[0].What, "frames more than are reserved") {
					t.Errorf("%+v: want what the kernel counts", list)
				}
				list = list[:max(0, len(list)-1)]
			}
			if c.want == "" && len(list) == 0 {
				return
			}
			if len(list) != 1 || !strings.Contains(list[0].What, c.want) || c.off != -2 && list[0].Off != c.off {
				t.Errorf("%+v, want %q at %d", list, c.want, c.off)
			}
		})
	}
	if list, _ := problems(t, v); len(list) > 0 {
		t.Errorf("after all was healed: %+v", list)
	}
}

// logLines are records, for a test to look at.
type logLines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logLines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

// take returns what was logged since the last call.
func (l *logLines) take(t *testing.T) (records []map[string]any) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for dec := json.NewDecoder(&l.buf); dec.More(); {
		var r map[string]any
		if err := dec.Decode(&r); err != nil {
			t.Fatal(err)
		}
		records = append(records, r)
	}
	return records
}

// A fault that waits for its manager, or for a frame, is logged once, with what it waits for, and again when it waits no more.
func TestSlowFault(t *testing.T) {
	v := newVM(t, 64<<10)
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: 64 << 10, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	lines := &logLines{}
	log, slow := slog.New(slog.NewJSONHandler(lines, nil)), slowWaits{}
	look := func(want string, checks map[string]any) {
		t.Helper()
		v.watchSlow(log, slow, time.Now())
		records := lines.take(t)
		if want == "" && len(records) == 0 {
			return
		}
		if len(records) != 1 || records[0]["msg"] != want {
			t.Fatalf("logged %v, want %q", records, want)
		}
		for k, val := range checks {
			if records[0][k] != val {
				t.Errorf("%s is %v, want %v", k, records[0][k], val)
			}
		}
	}
	s.forget.Store(true)
	read := make(chan []byte, 1)
	go func() { read <- x.read(1, 3*4096, 4) }()
	for len(v.waits()) == 0 {
		time.Sleep(time.Millisecond)
	}
	look("", nil) // not yet
	time.Sleep(slowFault)
	look("a fault waits", map[string]any{"level": "WARN", "object": float64(o.ID()), "off": float64(3 * 4096), "for": ForManager, "pid": float64(x.PID())})
	look("", nil) // once
	if w := v.Dump().Waits; len(w) != 1 || !w[0].Thread || w[0].Age < slowFault || w[0].For != ForManager || w[0].TID == 0 {
		t.Errorf("dump: %+v", w)
	}
	s.ctl.DataUnavailable(emm.Run{Off: 0, Size: o.Size()})
	if b := <-read; !bytes.Equal(b, make([]byte, 4)) {
		t.Fatalf("read %q", b)
	}
	look("", nil)
	look("a fault waits no more", map[string]any{"level": "INFO", "object": float64(o.ID()), "off": float64(3 * 4096), "page": "Clean"})
	look("", nil)
}

// A fault that finds no frame is among the waits.
func TestWaitForFrame(t *testing.T) {
	v := newVM(t, 64<<10)
	o := newObject(t, v, ObjectOptions{Size: 64 << 10, Manager: &shelf{}, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	hold := v.frames.ReserveUpTo(1 << 20) // somebody else has them all
	read := make(chan []byte, 1)
	go func() { read <- x.read(1, 7*4096, 4) }()
	var w []Wait
	for len(w) == 0 {
		w = v.waits()
	}
	if len(w) != 1 || w[0].For != ForFrame || w[0].Object != o.ID() || w[0].Off != 7*4096 || w[0].PID != x.PID() || w[0].Mapped != m.ID() || !w[0].Thread {
		t.Errorf("%+v", w)
	}
	v.frames.Release(hold)
	if b := <-read; !bytes.Equal(b, make([]byte, 4)) {
		t.Fatalf("read %q", b)
	}
}
