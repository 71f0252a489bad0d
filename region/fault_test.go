//go:build linux

package region

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
)

// wantFault checks an error of region memory.
func wantFault(t *testing.T, err error, r *Region, off int64, reasons ...error) {
	t.Helper()
	var fe *FaultError
	if !errors.As(err, &fe) || fe.Region != r || fe.Offset != off {
		t.Fatalf("got %#v (%v), want a fault at %d", err, err, off)
	}
	for _, reason := range reasons {
		if !errors.Is(err, reason) {
			t.Fatalf("%v is not %v", err, reason)
		}
	}
}

var sink byte

func TestReadAtFault(t *testing.T) {
	p, _ := startFake(t, nil)
	r := mapObject(t, p, 5*4096, &ObjectOptions{Arg: "b2,b4"}, &MapOptions{Offset: 1000})
	b := make([]byte, 5*4096-1000)
	n, err := r.ReadAt(b, 0)
	if n != 2*4096-1000 {
		t.Errorf("%d bytes before the bad page", n)
	}
	wantFault(t, err, r, 2*4096-1000, emm.MemoryError, unix.EIO)
	if !strings.Contains(err.Error(), "the fake store") {
		t.Error(err)
	}
	same(t, "before the bad page", b[:n], pattern(1000, int64(n)))
	// The marker was dropped, the store has recovered: the same page reads right.
	n, err = r.ReadAt(b, 0)
	if n != 4*4096-1000 {
		t.Errorf("%d bytes before the second bad page", n)
	}
	wantFault(t, err, r, 4*4096-1000, emm.MemoryError)
	n, err = r.WriteAt([]byte{1, 2, 3}, 4*4096-1001)
	if n != 3 || err != nil {
		t.Fatal(n, err)
	}
}

func TestGuardFault(t *testing.T) {
	p, _ := startFake(t, nil)
	for _, readOnly := range []bool{false, true} {
		r := mapObject(t, p, 6*4096, &ObjectOptions{Arg: "b1,b3,b4"}, &MapOptions{ReadOnly: readOnly})
		got := make([]byte, 6*4096)
		deferred := false
		err := Guard(func() error {
			defer func() { deferred = true }()
			copy(got, r.Bytes())
			return errors.New("came back")
		})
		var fe *FaultError
		if !errors.As(err, &fe) || fe.Offset/4096 != 1 || !errors.Is(err, emm.MemoryError) || !errors.Is(err, unix.EIO) || !deferred {
			t.Fatalf("copy: %v", err)
		}
		err = Guard(func() error { sink = r.Bytes()[3*4096+5]; return nil })
		wantFault(t, err, r, 3*4096+5, emm.MemoryError)
		inner := errors.New("from inside")
		if err := Guard(func() error {
			err := Guard(func() error { sink = r.Bytes()[4*4096]; return nil })
			wantFault(t, err, r, 4*4096, emm.MemoryError)
			copy(got, r.Bytes()) // all is healed
			return inner
		}); err != inner {
			t.Fatal(err)
		}
		same(t, "healed", got, pattern(0, 6*4096))
	}
}

func TestGuardReadOnly(t *testing.T) {
	p, _ := startFake(t, nil)
	r := mapObject(t, p, 2*4096, nil, &MapOptions{ReadOnly: true})
	for range 2 {
		err := Guard(func() error { r.Bytes()[5000] = 1; return nil })
		wantFault(t, err, r, 5000, emm.ProtectionFailure)
	}
	if r.Bytes()[5000] != 2 {
		t.Error("written")
	}
}

func TestGuardPassesThrough(t *testing.T) {
	value := &struct{ x int }{1}
	var nilPointer *[100]byte
	foreign, err := unix.MmapPtr(-1, 0, nil, 4096, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.MunmapPtr(foreign, 4096)
	before := debug.SetPanicOnFault(false)
	defer debug.SetPanicOnFault(before)
	for name, c := range map[string]struct {
		fn    func() error
		check func(v any) bool
	}{
		"a value":       {func() error { panic(value) }, func(v any) bool { return v == any(value) }},
		"a nil pointer": {func() error { sink = nilPointer[5]; return nil }, func(v any) bool { _, ok := v.(runtime.Error); return ok }},
		"an index":      {func() error { sink = make([]byte, 1)[len(t.Name())]; return nil }, func(v any) bool { _, ok := v.(runtime.Error); return ok }},
		"somebody else's": {func() error { sink = *(*byte)(foreign); return nil },
			func(v any) bool { a, ok := faultAddress(v); return ok && a == uintptr(foreign) }},
		"an error value":   {func() error { panic(emm.Failure) }, func(v any) bool { return v == any(emm.Failure) }},
		"panic with a nil": {func() error { panic(nil) }, func(v any) bool { _, ok := v.(*runtime.PanicNilError); return ok }},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				v := recover()
				if !c.check(v) {
					t.Errorf("recovered %#v", v)
				}
				if debug.SetPanicOnFault(false) {
					t.Error("SetPanicOnFault was left on")
				}
			}()
			err := Guard(c.fn)
			t.Errorf("came back with %v", err)
		})
	}
	if err := Guard(func() error { return nil }); err != nil {
		t.Error(err)
	}
	exited := make(chan bool)
	go func() {
		returned := false
		defer func() { exited <- !returned }()
		Guard(func() error { runtime.Goexit(); return nil })
		returned = true
	}()
	if !<-exited {
		t.Error("Goexit was caught")
	}
}

// A Region is closed under a Guard: its touches are errors, and its addresses nobody else's, until the Guard has ended; later Guards do not matter.
func TestCloseInsideGuard(t *testing.T) {
	p, _ := startFake(t, nil)
	reserved := func(address uint64) bool {
		b, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			var start, end uint64
			var access string
			if _, err := fmt.Sscanf(line, "%x-%x %s", &start, &end, &access); err != nil {
				t.Fatal(err)
			}
			if start <= address && address < end { // accessible: it is somebody else's by now
				return access == "---p"
			}
		}
		return false
	}
	const rounds = closedMax + 10
	var first, last *Region
	err := Guard(func() error {
		for i := range rounds {
			r := mapObject(t, p, 4096, nil, nil)
			if i == 0 {
				first = r
			}
			last = r
			kept := r.Bytes()
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if i == rounds-1 {
				sink = kept[7]
			}
		}
		return nil
	})
	wantFault(t, err, last, 7, ErrClosed)
	if reserved(last.address()) {
		t.Error("the addresses are still taken after the Guard")
	}
	if r, _ := mapped.find(uintptr(first.address())); r != nil {
		t.Error("the region is still known")
	}

	r := mapObject(t, p, 4096, nil, nil)
	kept := r.Bytes()
	closed, late, done := make(chan bool), make(chan bool), make(chan error)
	go func() {
		done <- Guard(func() error {
			<-closed
			sink = kept[9]
			return nil
		})
	}()
	for before := uint64(0); before == 0; runtime.Gosched() {
		inside.mu.Lock()
		before = uint64(inside.active.Len())
		inside.mu.Unlock()
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if !reserved(r.address()) {
		t.Error("the addresses were given away under a Guard")
	}
	go func() {
		done <- Guard(func() error { late <- true; <-late; return nil })
	}()
	<-late
	close(closed)
	wantFault(t, <-done, r, 9, ErrClosed)
	if reserved(r.address()) {
		t.Error("a Guard that began after Close keeps the addresses")
	}
	late <- true
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// The pager is killed: waits end, everything says so, resident pages stay, missing ones are errors, never zeros.
func TestPagerGone(t *testing.T) {
	p, cmd := startFake(t, nil)
	fresh, err := p.ObjectCreate(deadline(t), 4096, nil)
	if err != nil {
		t.Fatal(err)
	}
	// Resident and write-protected: page 0. Nobody answers: page 1. Protected while absent: page 2. Never touched: the rest, more than one step.
	const size = 5 << 20
	r := mapObject(t, p, size, &ObjectOptions{Arg: "w,s1"}, nil)
	ro := mapObject(t, p, 2*4096, nil, &MapOptions{ReadOnly: true})
	b := make([]byte, 4096)
	if _, err := r.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	sink = ro.Bytes()[0]
	if err := r.fd.WriteProtect(r.address()+8192, 4096, 1); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			b := make([]byte, 8192)
			var err error
			if i%2 == 0 {
				_, err = r.ReadAt(b, 0)
			} else {
				_, err = r.WriteAt(b[:4096], 4096)
			}
			wantFault(t, err, r, 4096, ErrPagerGone, emm.MemoryFailure)
		})
		wg.Go(func() {
			if err := r.Populate(deadline(t), 0, 8192, false); !errors.Is(err, ErrPagerGone) {
				t.Errorf("populate: %v", err)
			}
		})
	}
	waitFaulting(t, 6)
	killed := time.Now()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	<-p.watched // from here on no touch can wait, so this process may touch
	t.Logf("everybody had an error %v after the kill", time.Since(killed))

	_, err1 := p.ObjectCreate(deadline(t), 1, nil)
	_, err2 := fresh.Map(deadline(t), nil)
	_, err3 := p.Info(deadline(t))
	_, err4 := p.Objects(deadline(t))
	_, err5 := r.ReadAt(b, 0)
	_, err6 := r.WriteAt(b, 0)
	_, err7 := fresh.Pages(deadline(t))
	for i, err := range []error{err1, err2, err3, err4, err5, err6, err7, r.PageOut(deadline(t), 0, 1), r.Populate(deadline(t), 0, 1, true)} {
		if !errors.Is(err, ErrPagerGone) {
			t.Errorf("call %d: %v", i+1, err)
		}
	}
	r.Stats()
	for range 2 { // the marker stays
		for _, at := range []int64{4096, 8192, 3 * 4096, 2<<20 + 5, size - 1} {
			err := Guard(func() error { sink = r.Bytes()[at]; return nil })
			var fe *FaultError
			if !errors.As(err, &fe) || fe.Offset/4096 != at/4096 || !errors.Is(err, ErrPagerGone) || !errors.Is(err, emm.MemoryFailure) {
				t.Errorf("touch at %d: %v", at, err)
			}
		}
		err := Guard(func() error { sink = ro.Bytes()[4096]; return nil })
		if !errors.Is(err, ErrPagerGone) {
			t.Errorf("touch of the read-only region: %v", err)
		}
	}
	if err := Guard(func() error {
		if r.Bytes()[0] != 1 || ro.Bytes()[0] != 1 {
			t.Error("a resident page changed")
		}
		r.Bytes()[0] = 5 // was write-protected
		if r.Bytes()[0] != 5 {
			t.Error("not written")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := r.Close(); !errors.Is(err, ErrPagerGone) {
		t.Error(err)
	}
	if err := fresh.Close(); !errors.Is(err, ErrPagerGone) {
		t.Error(err)
	}
	if r.Bytes() != nil {
		t.Error("bytes after Close")
	}
}

func BenchmarkReadAtResident(b *testing.B) {
	ours, theirs := sockets(b)
	cmd := child(b, "pager", theirs, nil)
	uc, err := pairConn(ours)
	if err != nil {
		b.Fatal(err)
	}
	p, err := FromConn(b.Context(), uc, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer cmd.Wait()
	defer p.Close()
	r, err := p.Allocate(b.Context(), 1<<20, nil)
	if err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{64, 4096, 64 << 10, 1 << 20} {
		buf := make([]byte, n)
		if _, err := r.ReadAt(buf, 0); err != nil {
			b.Fatal(err)
		}
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				if _, err := r.ReadAt(buf, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
