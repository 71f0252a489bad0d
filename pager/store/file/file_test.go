package file

import (
	"bytes"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

func open(t testing.TB, o *Options) *Store {
	t.Helper()
	o.Dir = t.TempDir()
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func flip(t testing.TB, s store.Store, slot store.Slot) {
	storetest.Flip(t, s.(*Store).File(), offset(slot)+1234)
}

func TestConformance(t *testing.T) {
	for name, o := range map[string]Options{"default": {}, "one worker, no slack": {Workers: 1, Slack: -1}, "preallocated": {Preallocate: true}} {
		t.Run(name, func(t *testing.T) {
			storetest.Run(t, storetest.Harness{
				New: func(t testing.TB, capacity int64) store.Store {
					o := o
					if o.Capacity = capacity; capacity == 0 {
						o.Preallocate = false
					}
					return open(t, &o)
				},
				Corrupt: flip,
			})
		})
	}
}

// awkward is a file whose system calls do what call says first.
type awkward struct {
	transfer
	call func(write bool, b []byte) (n int, err error, handled bool)
}

func (a *awkward) pread(b []byte, off int64) (int, error) {
	n, err, handled := a.call(false, b)
	if handled {
		return n, err
	}
	return a.transfer.pread(b[:n], off)
}

func (a *awkward) pwrite(b []byte, off int64) (int, error) {
	n, err, handled := a.call(true, b)
	if handled {
		return n, err
	}
	return a.transfer.pwrite(b[:n], off)
}

func awkwardStore(t *testing.T, call func(write bool, b []byte) (int, error, bool)) *Store {
	t.Helper()
	f, err := create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	sums, err := store.NewAnonymous(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	s := start(&Options{Workers: 1}, f, sums, &awkward{descriptor(f.Fd()), call})
	t.Cleanup(func() { s.Close() })
	return s
}

func alloc(t *testing.T, s *Store, n int) store.Slot {
	t.Helper()
	slot, m, err := s.Alloc(n, n)
	if err != nil || m != n {
		t.Fatal(m, err)
	}
	return slot
}

func pattern(n int, seed uint64) []byte {
	b := make([]byte, n*store.SlotSize)
	storetest.Fill(b, seed)
	return b
}

func TestInterruptedAndShortTransfersGoOn(t *testing.T) {
	calls := 0
	s := awkwardStore(t, func(_ bool, b []byte) (int, error, bool) {
		if calls++; calls%3 == 0 {
			return -1, unix.EINTR, true
		}
		return min(len(b), 1000), nil, false
	})
	slot := alloc(t, s, 8)
	want, got := pattern(8, 1), pattern(8, 2)
	if _, err := storetest.Do(t, s.Write, slot, want); err != nil {
		t.Fatal(err)
	}
	if _, err := storetest.Do(t, s.Read, slot, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read back: %v", err)
	}
	if calls < 90 {
		t.Errorf("%d calls: the transfers were not short", calls)
	}
}

func TestErrorsReachDone(t *testing.T) {
	var fail atomic.Pointer[error]
	s := awkwardStore(t, func(_ bool, b []byte) (int, error, bool) {
		if e := fail.Load(); e != nil {
			if *e == nil {
				return 0, nil, true // end of file
			}
			return -1, *e, true
		}
		return len(b), nil, false
	})
	old := alloc(t, s, 4)
	want := pattern(4, 1)
	if _, err := storetest.Do(t, s.Write, old, want); err != nil {
		t.Fatal(err)
	}
	slot := alloc(t, s, 4)
	for _, c := range []struct{ err, write, read error }{
		{unix.ENOSPC, store.ErrNoSpace, unix.ENOSPC},
		{unix.EDQUOT, store.ErrNoSpace, unix.EDQUOT},
		{unix.EIO, unix.EIO, unix.EIO},
		{nil, errAny, errAny},
	} {
		fail.Store(&c.err)
		for name, o := range map[string]struct {
			call func(*store.Op)
			slot store.Slot
			want error
		}{"write": {s.Write, slot, c.write}, "read": {s.Read, old, c.read}} {
			_, err := storetest.Do(t, o.call, o.slot, pattern(4, 9))
			if err == nil || o.want != errAny && !errors.Is(err, o.want) || c.err != nil && !errors.Is(err, c.err) {
				t.Errorf("%s with %v: %v", name, c.err, err)
			}
		}
		fail.Store(nil)
		got := pattern(4, 8)
		if _, err := storetest.Do(t, s.Read, old, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("after %v: what was stored before cannot be read: %v", c.err, err)
		}
	}
	if _, err := storetest.Do(t, s.Write, slot, want); err != nil {
		t.Errorf("write after all errors: %v", err)
	}
}

var errAny = errors.New("any error")

// What somebody waits for goes before prefetches, and nothing runs on the caller's goroutine.
func TestDemandBeforePrefetch(t *testing.T) {
	gate := make(chan struct{})
	var once sync.Once
	entered := make(chan struct{})
	s := awkwardStore(t, func(write bool, b []byte) (int, error, bool) {
		if !write {
			once.Do(func() { close(entered); <-gate })
		}
		return len(b), nil, false
	})
	slot := alloc(t, s, 8)
	if _, err := storetest.Do(t, s.Write, slot, pattern(8, 1)); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var order []store.Slot
	var wg sync.WaitGroup
	read := func(i int, prefetch bool) {
		wg.Add(1)
		s.Read(&store.Op{Slot: slot + store.Slot(i), Data: make([]byte, store.SlotSize), Prefetch: prefetch, Done: func(op *store.Op) {
			mu.Lock()
			order = append(order, op.Slot-slot)
			mu.Unlock()
			wg.Done()
		}})
	}
	read(0, false) // would not return if the caller did the I/O
	<-entered
	for i := 1; i < 4; i++ {
		read(i, true)
	}
	for i := 4; i < 7; i++ {
		read(i, false)
	}
	close(gate)
	wg.Wait()
	want := []store.Slot{0, 4, 5, 6, 1, 2, 3}
	for i := range want {
		if order[i] != want[i] {
			t.Fatalf("order %v, want %v", order, want)
		}
	}
}

func TestFileHasNoName(t *testing.T) {
	dir := t.TempDir()
	s, err := New(&Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("directory has %v, %v", names, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(s.File().Fd()), &st); err != nil || st.Nlink != 0 || st.Mode&0o777 != 0o600 {
		t.Errorf("paging file has %d links, mode %o: %v", st.Nlink, st.Mode, err)
	}
	if _, err := New(&Options{Dir: dir + "/none"}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("in a directory that is not there: %v", err)
	}
}

func TestPlaceIsGivenBack(t *testing.T) {
	s := open(t, &Options{Slack: -1})
	slot := alloc(t, s, 512)
	if _, err := storetest.Do(t, s.Write, slot, pattern(512, 1)); err != nil {
		t.Fatal(err)
	}
	s.Free(slot, 256)
	s.Free(slot+256, 255)
	deadline := time.Now().Add(storetest.Deadline)
	for {
		var st unix.Stat_t
		if err := unix.Fstat(int(s.File().Fd()), &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks*512 < 64<<10 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes still used", st.Blocks*512)
		}
		time.Sleep(5 * time.Millisecond)
	}
	got := pattern(1, 0)
	if _, err := storetest.Do(t, s.Read, slot+511, got); err != nil || !bytes.Equal(got, pattern(512, 1)[511*store.SlotSize:]) {
		t.Errorf("the slot that was kept: %v", err)
	}
	if i := s.Info(); i.Used != store.SlotSize || i.Free <= 0 {
		t.Errorf("info: %+v", i)
	}
}

// noClose is memory that outlives a store.
type noClose struct{ store.Memory }

func (noClose) Close() error { return nil }

func TestRestart(t *testing.T) {
	mem, err := store.NewAnonymous(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	first := open(t, &Options{Sums: noClose{mem}})
	kept := alloc(t, first, 512)
	lost := alloc(t, first, 512)
	for slot, seed := range map[store.Slot]uint64{kept: 1, lost: 2} {
		if _, err := storetest.Do(t, first.Write, slot, pattern(512, seed)); err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.Dup(int(first.File().Fd()))
	if err != nil {
		t.Fatal(err)
	}
	first.Close()

	second, err := New(&Options{File: os.NewFile(uintptr(fd), "paging file"), Sums: noClose{mem}})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := second.Rebuild(func(yield func(store.Slot, int) bool) { yield(kept, 512) }); err != nil {
		t.Fatal(err)
	}
	got := pattern(512, 7)
	if _, err := storetest.Do(t, second.Read, kept, got); err != nil || !bytes.Equal(got, pattern(512, 1)) {
		t.Errorf("read what was kept: %v", err)
	}
	if again := alloc(t, second, 512); again != lost {
		t.Errorf("slot %d was not reused: got %d", lost, again)
	}
}

func TestPreallocate(t *testing.T) {
	if _, err := New(&Options{Dir: t.TempDir(), Preallocate: true}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("preallocate without a capacity: %v", err)
	}
	const size = 8 << 20
	s := open(t, &Options{Preallocate: true, Capacity: size})
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(int(s.File().Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	if got := blocks(); got < size {
		t.Fatalf("%d bytes are allocated, want %d", got, size)
	}
	slot := alloc(t, s, 512)
	if _, err := storetest.Do(t, s.Write, slot, pattern(512, 1)); err != nil {
		t.Fatal(err)
	}
	s.Free(slot, 512)
	if got := blocks(); got < size {
		t.Errorf("%d bytes are allocated after all was freed, want %d", got, size)
	}
}

// Punches hold everybody up, so few are made at a time, of many slots each; and what was freed goes back to the file system all the same.
func TestPunchesAreFew(t *testing.T) {
	const slots = 8192
	s := open(t, &Options{Slack: 64 * store.SlotSize})
	first := alloc(t, s, slots)
	for i := store.Slot(0); i < slots; i += 512 {
		if _, err := storetest.Do(t, s.Write, first+i, pattern(512, 1)); err != nil {
			t.Fatal(err)
		}
	}
	held := func() int64 { return s.Room().Held / store.SlotSize }
	for i := store.Slot(0); i < slots; i += 2 { // no two in a row
		s.Free(first+i, 1)
	}
	time.Sleep(3 * punchEvery)
	if n := held(); n != slots/2 {
		t.Errorf("of %d scattered free slots %d keep their place", slots/2, n)
	}
	if again := alloc(t, s, 1); again != first {
		t.Errorf("slot %d was allocated, want the first free one", again)
	} else {
		s.Free(again, 1)
	}
	for i := store.Slot(1); i < slots; i += 2 {
		s.Free(first+i, 1)
	}
	for end := time.Now().Add(storetest.Deadline); held() > 64; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d free slots keep their place", held())
		}
	}
}
