package vm

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// library is a manager of which each page has contents of its own. It counts what is asked for, and answers after a while, on a goroutine of its own, if it has a delay.
type library struct {
	shelf
	delay         time.Duration
	demand, ahead atomic.Int64 // requests that a thread waits for; others
	out           sync.WaitGroup
}

func (s *library) pageAt(off int64) []byte { return fillBytes(int(s.size), byte(off/s.size*7)) }

func (s *library) DataRequest(h emm.Head, want emm.Run, need int64, access emm.Prot) emm.KernReturn {
	if need >= 0 {
		s.demand.Add(1)
	} else {
		s.ahead.Add(1)
	}
	answer := func() {
		b := make([]byte, 0, want.Size)
		for off := want.Off; off < want.End(); off += s.size {
			b = append(b, s.pageAt(off)...)
		}
		h.Control.DataSupply(want.Off, b, emm.ProtNone, false, false)
	}
	if s.delay == 0 {
		answer()
		return emm.Success
	}
	s.out.Go(func() { time.Sleep(s.delay); answer() })
	return emm.Success
}

// A stream of reads is read ahead of its reader: once it is known, nobody waits for an extent to be asked for. What is read is right, and the budget holds.
func TestStreamAhead(t *testing.T) {
	const size, budget = 64 << 20, 32 << 20
	for _, c := range []struct {
		name     string
		ps       int
		delay    time.Duration
		down, ro bool
	}{{name: "up", ps: 4096}, {name: "down", ps: 4096, down: true}, {name: "read-only", ps: 4096, ro: true}, {name: "slow", ps: 4096, delay: 2 * time.Millisecond}, {name: "large pages", ps: 65536}} {
		t.Run(c.name, func(t *testing.T) {
			v := newVM(t, budget)
			if !v.frames.Extents() {
				t.Fatal("no extents of one folio here")
			}
			s := &library{delay: c.delay}
			defer s.out.Wait()
			o := newObject(t, v, ObjectOptions{Size: size, PageSize: c.ps, Manager: s, Port: emm.NewPort()})
			defer watch(t, o, budget)()
			x := startTask(t, v)
			x.mapObject(o, 1, 0, o.Size(), c.ro)
			step := int64(64 << 10)
			if c.down {
				step = 4096 // within a larger piece the reader would go up
			}
			for i := int64(0); i < size; i += step {
				off := i
				if c.down {
					off = size - step - i
				}
				got := x.read(1, off, step)
				for p := int64(0); p < step; p += int64(c.ps) {
					if !bytes.Equal(got[p:p+int64(c.ps)], s.pageAt(off+p)) {
						t.Fatalf("offset %d: wrong bytes", off+p)
					}
				}
			}
			demand, ahead := s.demand.Load(), s.ahead.Load()
			t.Logf("%d requests that a thread waited for, %d others, for %d extents", demand, ahead, size/extentSize)
			if ahead < size/extentSize/2 {
				t.Errorf("%d of %d extents were asked for ahead, %d requests were waited for", ahead, size/extentSize, demand)
			}
		})
	}
}

// Who reads at random has nothing brought in ahead.
func TestNoStream(t *testing.T) {
	v := newVM(t, 32<<20)
	s := &library{}
	o := newObject(t, v, ObjectOptions{Size: 64 << 20, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(o, 1, 0, o.Size(), false)
	for range 2000 {
		off := rand.Int64N(o.npages()) * 4096
		if got := x.read(1, off, 4096); !bytes.Equal(got, s.pageAt(off)) {
			t.Fatalf("offset %d: wrong bytes", off)
		}
	}
	if n := s.ahead.Load(); n > 0 {
		t.Errorf("%d requests that nobody waits for", n)
	}
}

// A mapping, and an object, that ends while extents are being brought in ahead ends at once, and leaves nothing.
func TestStreamEnds(t *testing.T) {
	v := newVM(t, 32<<20)
	for i := range 20 {
		s := &library{delay: time.Millisecond}
		o := newObject(t, v, ObjectOptions{Size: 32 << 20, Manager: s, Port: emm.NewPort()})
		x := startTask(t, v)
		x.mapObject(o, 1, 0, o.Size(), false)
		for off := int64(0); off < 6<<20; off += 64 << 10 {
			x.read(1, off, 4096)
			x.read(1, off+4096, 60<<10)
		}
		if i%2 == 0 {
			x.Close()
		}
		o.Terminate()
		s.out.Wait()
	}
	if n := v.wanted.Load(); n != 0 {
		for range 100 { // a job may still be on its way to find that its mapping is gone
			if n = v.wanted.Load(); n == 0 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if n != 0 {
			t.Errorf("%d frames are wanted by nobody", n)
		}
	}
}

// An extent that waits to be brought in when the object shrinks is not brought in.
func TestStreamShrinks(t *testing.T) {
	v := newVM(t, 32<<20)
	s := &library{}
	o := newObject(t, v, ObjectOptions{Size: 16 << 20, Manager: s, Port: emm.NewPort()})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	first := int64(4 * 512)
	j := aheadJob{m, first, markAt(first, 1)}
	if err := o.SetSize(context.Background(), 4<<20); err != nil {
		t.Fatal(err)
	}
	j.bring()
	if st := o.word(first).State(); st != page.Absent {
		t.Errorf("page %d beyond the limit of %d pages is %v", first, o.limit.Load(), st)
	}
}

// Extents that wait while a manager takes its time make nobody give up his pages: room is made for those that are being brought in alone.
func TestStreamsWait(t *testing.T) {
	v := newVM(t, 64<<20)
	s := &stuckManager{gate: make(chan struct{})}
	o := newObject(t, v, ObjectOptions{Size: 256 << 20, Manager: s, Port: emm.NewPort()})
	other := newObject(t, v, ObjectOptions{Size: 56 << 20, Manager: &shelf{}, Port: emm.NewPort()})
	x := startTask(t, v)
	x.mapObject(other, 1, 0, other.Size(), false)
	for off := int64(0); off < other.Size(); off += 64 << 10 {
		x.write(1, off, fillBytes(64<<10, 1))
	}
	before := other.Stats().Resident
	m := x.mapObject(o, 2, 0, o.Size(), false)
	for i := range int64(40) {
		select {
		case v.aheadJobs <- aheadJob{m, i * 512, markAt(i*512, 1)}:
		default:
		}
	}
	v.kickNow()
	time.Sleep(time.Second)
	if now := other.Stats().Resident; now < before-(streamWorkers+1)*512 {
		t.Errorf("another object has %d pages resident, of %d before", now, before)
	}
	close(s.gate)
}

// stuckManager answers in the call, when the gate is open.
type stuckManager struct {
	library
	gate chan struct{}
}

func (s *stuckManager) DataRequest(h emm.Head, want emm.Run, need int64, access emm.Prot) emm.KernReturn {
	<-s.gate
	return s.library.DataRequest(h, want, need, access)
}
