package pager

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
	"machpager/pager/store"
	"machpager/pager/store/memory"
	"machpager/pager/store/storetest"
)

func TestConformance(t *testing.T) {
	boom := errors.New("boom")
	for name, h := range map[string]emmtest.Harness{
		"memory": {PageSizes: []int{4096, 16384}, New: func(t testing.TB) emmtest.System { return system(t, memoryStore(t, nil), false) }},
		"file":   {PageSizes: []int{4096, 16384}, New: func(t testing.TB) emmtest.System { return system(t, fileStore(t), false) }},
		"faulty": {New: func(t testing.TB) emmtest.System {
			f := storetest.NewFaulty(memoryStore(t, nil))
			every := func(n int) func(store.Slot, int) bool {
				var mu sync.Mutex
				i := 0
				return func(store.Slot, int) bool { mu.Lock(); defer mu.Unlock(); i++; return i%n == 0 }
			}
			for _, fault := range []storetest.Fault{
				{Label: "full", On: storetest.OnAlloc, Match: every(11), Err: store.ErrNoSpace},
				{Label: "write", On: storetest.OnWrite, Match: every(7), Err: boom},
				{Label: "short write", On: storetest.OnWrite, Match: every(9), IsShort: true, Short: 1},
				{Label: "slow write", On: storetest.OnWrite, Match: every(5), Delay: time.Millisecond},
				{Label: "read", On: storetest.OnRead, Match: every(13), Err: boom},
				{Label: "slow read", On: storetest.OnRead, Match: every(5), Delay: time.Millisecond},
				{Label: "short read", On: storetest.OnRead, Match: every(7), IsShort: true, Short: 2},
				{Label: "rot", On: storetest.OnRead, Match: every(11), Corrupt: true, Short: 1},
			} {
				f.Inject(fault)
			}
			return system(t, f, true)
		}},
		"slow": {New: func(t testing.TB) emmtest.System {
			f := storetest.NewFaulty(memoryStore(t, nil))
			f.Inject(storetest.Fault{Label: "slow", On: storetest.OnRead | storetest.OnWrite, Delay: 200 * time.Microsecond})
			return system(t, f, false)
		}},
	} {
		t.Run(name, func(t *testing.T) { emmtest.Run(t, h) })
	}
}

func TestLargestPages(t *testing.T) {
	h := emmtest.Harness{New: func(t testing.TB) emmtest.System { return system(t, memoryStore(t, nil), false) }}
	names := []string{"RoundTrip", "Zeros", "InitAgain"}
	if raceEnabled {
		names = names[1:] // the race detector looks at every byte
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) { emmtest.Tests[name](t, h, MaxPageSize) })
	}
}

// What goes out together comes in together: one supply for each run, whatever the store.
func TestRuns(t *testing.T) {
	for name, s := range map[string]func(testing.TB) store.Store{
		"memory": func(t testing.TB) store.Store { return memoryStore(t, nil) },
		"file":   func(t testing.TB) store.Store { return fileStore(t) },
	} {
		t.Run(name, func(t *testing.T) {
			k, c := record(t, newPager(t, s(t)), 2048)
			k.Write(512*ps, emmtest.Fill(512, ps, 1))
			k.Read(run(0, 1536))
			expectRuns(t, "supplied", c.supply, run(512, 512))
			expectRuns(t, "unavailable", c.none, run(0, 512), run(1024, 512))

			for i := int64(15); i >= 0; i-- { // single pages in descending order lie in no run: gathered
				k.Write(i*ps, emmtest.Fill(1, ps, uint64(i)))
			}
			c.supply = nil
			k.Read(run(0, 16))
			expectRuns(t, "gathered", c.supply, run(0, 16))
			k.Check()
		})
	}
}

// An error is told for the pages it is about, and the rest is supplied. It passes when the store recovers.
func TestErrorsArePerPage(t *testing.T) {
	for _, on := range []storetest.On{storetest.OnRead, storetest.OnView} {
		f := storetest.NewFaulty(memoryStore(t, nil))
		p := newPager(t, f)
		k, c := record(t, p, 64)
		k.MayFail = true
		k.Write(0, emmtest.Fill(32, ps, 1))
		off := f.Inject(storetest.Fault{Label: "rot", On: on, Corrupt: true, Short: 5, Times: 1})
		k.Read(run(0, 40))
		expectRuns(t, "supplied", c.supply, run(0, 5), run(6, 26))
		expectRuns(t, "failed", c.failed, run(5, 1))
		off()
		if a := k.Read(run(5, 1)); a[0].Kind != emmtest.Supplied {
			t.Errorf("after the store recovered: %v", a[0].Kind)
		}
		c.failed = nil
		off = f.Inject(storetest.Fault{Label: "gone", On: on, Err: unix.EIO})
		for i, a := range k.Read(run(0, 33)) {
			if want := emmtest.Failed; i < 32 && (a.Kind != want || a.Reason != emm.MemoryError) || i == 32 && a.Kind != emmtest.Unavailable {
				t.Errorf("page %d of a store that fails: %v, %v", i, a.Kind, a.Reason)
			}
		}
		off()
		k.Read(run(0, 33))
		k.Check()
	}
}

// A return that fails changes nothing, in the map or in paging space, and says why.
func TestFailedReturnChangesNothing(t *testing.T) {
	f := storetest.NewFaulty(memoryStore(t, nil))
	p := newPager(t, f)
	k, _ := attach(t, p, 64, ps)
	k.MayFail = true
	old := emmtest.Fill(16, ps, 1)
	if kr := k.Write(0, old); kr != emm.Success {
		t.Fatal(kr)
	}
	used := f.Info().Used
	for _, c := range []struct {
		fault storetest.Fault
		want  emm.KernReturn
	}{
		{storetest.Fault{Label: "full", On: storetest.OnAlloc, Err: store.ErrNoSpace}, emm.NoSpace},
		{storetest.Fault{Label: "full later", On: storetest.OnAlloc, Err: store.ErrNoSpace, Skip: 2}, emm.NoSpace},
		{storetest.Fault{Label: "eio", On: storetest.OnWrite, Err: unix.EIO}, emm.MemoryError},
		{storetest.Fault{Label: "eio later", On: storetest.OnWrite, Err: unix.EIO, Skip: 1}, emm.MemoryError},
		{storetest.Fault{Label: "disk full", On: storetest.OnWrite, Err: fmt.Errorf("%w: %w", store.ErrNoSpace, unix.ENOSPC)}, emm.NoSpace},
		{storetest.Fault{Label: "short", On: storetest.OnWrite, IsShort: true, Short: 1, Times: 1}, emm.MemoryError},
		{storetest.Fault{Label: "slow and failing", On: storetest.OnWrite, Delay: time.Millisecond, Err: unix.EIO}, emm.MemoryError},
	} {
		data := emmtest.Fill(16, ps, 2)
		for i := 3; i < 16; i += 4 { // zeros between: several pieces
			clear(data[i*ps : (i+1)*ps])
		}
		off := f.Inject(c.fault)
		if kr := k.Write(0, data); kr != c.want {
			t.Errorf("%s: %v, want %v", c.fault.Label, kr, c.want)
		}
		if f.Hits(c.fault.Label) == 0 {
			t.Errorf("%s: did not strike", c.fault.Label)
		}
		off()
		if now := f.Info().Used; now != used {
			t.Errorf("%s: %d bytes used, before %d", c.fault.Label, now, used)
		}
		for i, a := range k.Read(run(0, 16)) {
			if !bytes.Equal(a.Data, old[i*ps:(i+1)*ps]) {
				t.Errorf("%s: page %d changed", c.fault.Label, i)
			}
		}
	}
	if kr := k.Write(0, emmtest.Fill(16, ps, 3)); kr != emm.Success {
		t.Errorf("after the store recovered: %v", kr)
	}
}

func TestZerosAreStoredAsNothing(t *testing.T) {
	s := memoryStore(t, nil)
	p := newPager(t, s)
	k, port := attach(t, p, 64, ps)
	k.Write(0, make([]byte, 64*ps))
	if used := s.Info().Used; used != 0 {
		t.Errorf("%d bytes for zeros", used)
	}
	k.Write(0, emmtest.Fill(64, ps, 1))
	data := emmtest.Fill(64, ps, 2)
	clear(data[10*ps : 30*ps])
	k.Write(0, data)
	if used := s.Info().Used; used != 44*ps {
		t.Errorf("%d pages used, want 44", used/ps)
	}
	runs, err := p.ObjectPages(port)
	if err != nil {
		t.Fatal(err)
	}
	expectRuns(t, "pages in paging space", runs, run(0, 10), run(30, 34))
	for i, a := range k.Read(run(10, 20)) {
		if a.Kind != emmtest.Unavailable {
			t.Errorf("page %d: %v", 10+i, a.Kind)
		}
	}
}

// A request that overtakes the end of a return waits for it, and so does a second return.
func TestOrderOfAPage(t *testing.T) {
	f := storetest.NewFaulty(memoryStore(t, nil))
	p := newPager(t, f)
	k, _ := attach(t, p, 64, ps)
	k.Write(0, emmtest.Fill(8, ps, 1))
	hold := make(chan struct{})
	off := f.Inject(storetest.Fault{Label: "held", On: storetest.OnWrite, Hold: hold, Times: 1})
	defer off()
	second, third := emmtest.Fill(8, ps, 2), emmtest.Fill(2, ps, 3)
	l2 := k.Give(0, second, false)
	l3 := k.Give(3*ps, third, false)
	r := k.Ask(run(2, 4), 2*ps)
	other := k.Ask(run(8, 4), 8*ps) // others do not wait
	other.Wait()
	if l2.Done() || l3.Done() || r.Done() {
		t.Fatal("answered before the return was stored")
	}
	close(hold)
	if kr := l2.Wait(); kr != emm.Success {
		t.Error(kr)
	}
	l3.Wait()
	want := append(append(append([]byte(nil), second[2*ps:3*ps]...), third...), second[5*ps:6*ps]...)
	for i, a := range r.Wait() {
		if !bytes.Equal(a.Data, want[i*ps:(i+1)*ps]) {
			t.Errorf("page %d: not what was returned before the request", 2+i)
		}
	}
}

// Slots under a slow read are not reused, though the page was returned again meanwhile and paging space is short.
func TestReadKeepsItsSlots(t *testing.T) {
	f := storetest.NewFaulty(memoryStore(t, &memory.Options{Capacity: 16 * ps}))
	p := newPager(t, f)
	port := emm.NewPort()
	if err := p.ObjectCreate(port, 64*ps, ps); err != nil {
		t.Fatal(err)
	}
	k := emmtest.NewKernel(t, p, port, ps)
	if kr := k.Init(); kr != emm.Success {
		t.Fatal(kr)
	}
	k.MayFail = true
	k.Write(0, emmtest.Fill(8, ps, 1))
	hold := make(chan struct{})
	off := f.Inject(storetest.Fault{Label: "held", On: storetest.OnRead, Hold: hold, Times: 1})
	defer off()
	r := k.Ask(run(0, 8), 0)
	if kr := k.Write(0, emmtest.Fill(8, ps, 2)); kr != emm.Success {
		t.Fatal(kr)
	}
	if kr := k.Write(8*ps, emmtest.Fill(8, ps, 3)); kr != emm.NoSpace {
		t.Errorf("a return found room while the old slots are being read: %v", kr)
	}
	if r.Done() {
		t.Fatal("answered before it was read")
	}
	close(hold)
	first := emmtest.Fill(8, ps, 1)
	deadline := time.Now().Add(emmtest.Deadline)
	for !r.Done() && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	for i, a := range r.Wait() {
		if !bytes.Equal(a.Data, first[i*ps:(i+1)*ps]) {
			t.Errorf("page %d: not what was stored when it was asked for", i)
		}
	}
	for f.Info().Used != 8*ps {
		if time.Now().After(deadline) {
			t.Fatalf("%d slots used, want 8", f.Info().Used/ps)
		}
		time.Sleep(time.Millisecond)
	}
	if kr := k.Write(8*ps, emmtest.Fill(8, ps, 3)); kr != emm.Success {
		t.Errorf("after the read: %v", kr)
	}
	expected := k.Violations() // the model knows only the second contents
	if len(expected) != 8 || !strings.Contains(expected[0], "not what was returned") {
		t.Errorf("violations: %v", expected)
	}
}

// Terminate with everything in flight: nothing is answered, loans end, no slot is left.
func TestTerminateWithIOInFlight(t *testing.T) {
	for _, temporary := range []bool{false, true} {
		f := storetest.NewFaulty(memoryStore(t, nil))
		p := newPager(t, f)
		port := emm.NewPort()
		k := emmtest.NewKernel(t, p, port, ps)
		if temporary {
			if kr := k.Create(emm.NewPort(), 64*ps); kr != emm.Success {
				t.Fatal(kr)
			}
		} else {
			if err := p.ObjectCreate(port, 64*ps, ps); err != nil {
				t.Fatal(err)
			}
			if kr := k.Init(); kr != emm.Success {
				t.Fatal(kr)
			}
		}
		k.MayFail = temporary
		k.Write(0, emmtest.Fill(16, ps, 1))
		hold := make(chan struct{})
		f.Inject(storetest.Fault{Label: "held", On: storetest.OnRead | storetest.OnWrite, Hold: hold})
		k.Ask(run(0, 4), 0)
		written, queued := k.Give(8*ps, emmtest.Fill(8, ps, 2), false), k.Give(8*ps, emmtest.Fill(4, ps, 3), false)
		k.Ask(run(8, 8), 8*ps) // waits for the returns
		if kr := k.Terminate(); kr != emm.Success {
			t.Fatal(kr)
		}
		if kr := k.Terminate(); kr != emm.InvalidArgument {
			t.Errorf("Terminate again: %v", kr)
		}
		time.Sleep(2 * emmtest.Grace) // from here on any answer is a violation
		if !temporary {
			if kr := p.NoSenders(port); kr != emm.Success {
				t.Error(kr)
			}
		}
		if infos := p.Objects(); len(infos) != 0 {
			t.Errorf("the object is still there: %+v", infos)
		}
		close(hold)
		written.Wait()
		queued.Wait()
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if used := f.Info().Used; used != 0 {
			t.Errorf("temporary %v: %d bytes leaked", temporary, used)
		}
		k.Check()
	}
}

func TestObjects(t *testing.T) {
	s := memoryStore(t, &memory.Options{Capacity: 1024 * ps})
	p := newPager(t, s)
	k, port := attach(t, p, 10, 2*ps)
	k.Write(0, emmtest.Fill(3, 2*ps, 1))
	if got, want := fmt.Sprintf("%+v", p.Objects()), "[{ID:0 Size:81920 PageSize:8192 Stored:24576 Temporary:false Attached:true}]"; got != want {
		t.Errorf("objects: %s, want %s", got, want)
	}
	if got, want := p.Info(), (Info{Total: 1024 * ps, Used: 6 * ps, Free: 1018 * ps, PageSize: ps}); got != want {
		t.Errorf("info: %+v, want %+v", got, want)
	}
	for _, c := range []struct {
		port     emm.Port
		size     int64
		pageSize int
	}{{port, ps, ps}, {emm.Port{}, ps, ps}, {emm.NewPort(), -1, ps}, {emm.NewPort(), ps, 0}, {emm.NewPort(), ps, 2048}, {emm.NewPort(), ps, 3 * ps}, {emm.NewPort(), ps, 4 << 20}, {emm.NewPort(), 1 << 60, ps}} {
		if err := p.ObjectCreate(c.port, c.size, c.pageSize); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("ObjectCreate(%d, %d): %v", c.size, c.pageSize, err)
		}
	}
	if kr := emmtest.NewKernel(t, p, port, 2*ps).Init(); kr != emm.Failure {
		t.Errorf("Init by a second vm: %v", kr)
	}
	if kr := emmtest.NewKernel(t, p, emm.NewPort(), ps).Init(); kr != emm.InvalidArgument {
		t.Errorf("Init of a foreign port: %v", kr)
	}
	if kr := p.NoSenders(emm.NewPort()); kr != emm.InvalidArgument {
		t.Errorf("NoSenders of a foreign port: %v", kr)
	}
	if kr := p.NoSenders(port); kr != emm.Success {
		t.Error(kr)
	}
	k.Read(emm.Run{Size: 10 * 2 * ps}) // the vm has it still
	k.Terminate()
	if kr := k.Init(); kr == emm.Success {
		t.Error("Init of an object that has ended")
	}
	if err := p.Close(); err != nil || s.Info().Used != 0 {
		t.Errorf("after the end: %v, %d bytes used", err, s.Info().Used)
	}
	if err := p.ObjectCreate(emm.NewPort(), ps, ps); err == nil {
		t.Error("ObjectCreate after Close")
	}
}

func TestBeyondTheObject(t *testing.T) {
	p := newPager(t, memoryStore(t, nil))
	k, _ := attach(t, p, 4, ps)
	k.MayFail = true
	for i, a := range k.Read(run(2, 6)) {
		if want := map[bool]emmtest.Kind{true: emmtest.Unavailable, false: emmtest.Failed}[i < 2]; a.Kind != want {
			t.Errorf("page %d: %v, want %v", 2+i, a.Kind, want)
		}
	}
	if kr := k.Write(3*ps, emmtest.Fill(2, ps, 1)); kr != emm.InvalidArgument {
		t.Errorf("return beyond the object: %v", kr)
	}
}

// A huge object costs what is stored of it.
func TestSparse(t *testing.T) {
	p := newPager(t, memoryStore(t, nil))
	const pages = 64 << 30 / ps
	k, port := attach(t, p, pages, ps)
	for _, page := range []int64{0, 12345678, pages - 1} {
		k.Write(page*ps, emmtest.Fill(1, ps, uint64(page)))
		k.Read(run(page, 1))
	}
	start := time.Now()
	runs, err := p.ObjectPages(port)
	if err != nil {
		t.Fatal(err)
	}
	expectRuns(t, "pages", runs, run(0, 1), run(12345678, 1), run(pages-1, 1))
	k.Terminate()
	p.NoSenders(port)
	p.Close()
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("looking through the map took %v", d)
	}
}

// Full paging space is told once, and again when it was not full in between.
func TestFullIsLoggedOnce(t *testing.T) {
	var log bytes.Buffer
	p, err := New(Options{Store: memoryStore(t, &memory.Options{Capacity: 4 * ps}), Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	k, _ := attach(t, p, 64, ps)
	k.MayFail = true
	for range 2 {
		for range 5 {
			if kr := k.Write(0, emmtest.Fill(5, ps, 1)); kr != emm.NoSpace {
				t.Errorf("return of 5 pages to 4 slots: %v", kr)
			}
		}
		k.Write(0, emmtest.Fill(1, ps, 1))
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 2 {
		t.Errorf("%d warnings:\n%s", n, log.String())
	}
}
