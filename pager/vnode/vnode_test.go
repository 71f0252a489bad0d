package vnode

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
)

// quiet discards what is logged.
var quiet = slog.New(slog.DiscardHandler)

// waitIdle waits until the contents of a closed Pager are closed: no worker is left.
func waitIdle(t testing.TB, p *Pager) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		ended, running := p.ended, p.running
		p.mu.Unlock()
		if ended && running == 0 {
			return
		}
		if time.Now().After(end) {
			t.Errorf("contents are not closed: %d workers", running)
			return
		}
	}
}

// tempFile makes an open file with the contents.
func tempFile(t testing.TB, contents []byte) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "vnode")
	if err == nil {
		_, err = f.Write(contents)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func openFile(t testing.TB, f *os.File, size int64) *Pager {
	t.Helper()
	p, err := File(f, size, &Options{Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const ps = 4096

// supplied is what a page was answered with.
func supplied(t *testing.T, a emmtest.Answer, want []byte) {
	t.Helper()
	if a.Kind != emmtest.Supplied || !bytes.Equal(a.Data, want) {
		t.Fatalf("answer %v %v, not what is there", a.Kind, a.Reason)
	}
}

func pad(b []byte) []byte { return append(bytes.Clone(b), make([]byte, (ps-len(b)%ps)%ps)...) }

// A file is read to its end and never written beyond it, whatever is in the last page's remainder.
func TestLastPage(t *testing.T) {
	const size = 2*ps + 100
	was := emmtest.Fill(3, ps, 1)[:size]
	f := tempFile(t, was)
	k := foreign(t, openFile(t, reopen(t, f, os.O_RDWR), size))
	answers := k.Read(emm.Run{Off: 0, Size: 3 * ps})
	supplied(t, answers[0], was[:ps])
	supplied(t, answers[2], pad(was[2*ps:]))
	data := bytes.Repeat([]byte{7}, ps)
	if kr := k.Write(2*ps, data); kr != emm.Success {
		t.Fatal(kr)
	}
	want := append(bytes.Clone(was[:2*ps]), data[:100]...)
	if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if a := k.Read(emm.Run{Off: 3 * ps, Size: ps}); a[0].Kind != emmtest.Failed || a[0].Reason != emm.MemoryFailure {
		t.Errorf("a page beyond the object: %v %v", a[0].Kind, a[0].Reason)
	}
	if kr := k.Write(3*ps, data); kr != emm.InvalidArgument {
		t.Errorf("return of a page beyond the object: %v", kr)
	}
}

// reopen opens a file once more.
func reopen(t testing.TB, f *os.File, flags int) *os.File {
	t.Helper()
	g, err := os.OpenFile(f.Name(), flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// foreign makes a vm of an object with contents that were there before: the Kernel's comparison is the test's own matter, so its Check is not called.
func foreign(t *testing.T, p *Pager) *emmtest.Kernel {
	t.Helper()
	k := emmtest.NewKernel(t, p, emm.NewPort(), ps)
	k.MayFail = true
	if kr := k.Init(); kr != emm.Success {
		t.Fatal(kr)
	}
	t.Cleanup(func() {
		k.Terminate()
		p.Close()
		waitIdle(t, p)
	})
	return k
}

// An object larger than its file makes it grow to what was written, and not to whole pages.
func TestGrowth(t *testing.T) {
	f := tempFile(t, []byte("0123456789"))
	k := foreign(t, openFile(t, reopen(t, f, os.O_RDWR), 4*ps+50))
	size := func(want int64) {
		t.Helper()
		if st, err := f.Stat(); err != nil || st.Size() != want {
			t.Fatalf("the file has %d bytes, want %d, %v", st.Size(), want, err)
		}
	}
	page := make([]byte, ps)
	copy(page, "0123456789")
	k.Write(0, page)
	size(10) // nothing but zeros behind its end
	page[20] = 'x'
	k.Write(0, page)
	size(21)
	k.Write(ps, make([]byte, ps))
	size(21)
	if a := k.Read(emm.Run{Off: 2 * ps, Size: ps}); a[0].Kind != emmtest.Unavailable {
		t.Fatalf("beyond the file: %v", a[0].Kind)
	}
	last := bytes.Repeat([]byte{1}, ps)
	k.Write(4*ps, last)
	size(4*ps + 50)
	supplied(t, k.Read(emm.Run{Off: 4 * ps, Size: ps})[0], pad(last[:50]))
	page[20] = 0
	k.Write(0, page)
	supplied(t, k.Read(emm.Run{Off: 0, Size: ps})[0], page) // zeros are written where the file has bytes
}

// A file that somebody truncates loses pages to errors, never to zeros, and is never given holes in their place.
func TestTruncated(t *testing.T) {
	const size = 8 * ps
	was := emmtest.Fill(8, ps, 2)
	f := tempFile(t, was)
	k := foreign(t, openFile(t, reopen(t, f, os.O_RDWR), size))
	if err := f.Truncate(2*ps + 10); err != nil {
		t.Fatal(err)
	}
	answers := k.Ask(emm.Run{Off: 0, Size: size}, 6*ps).Wait()
	supplied(t, answers[1], was[ps:2*ps])
	for i, a := range answers[2:] {
		if a.Kind != emmtest.Failed || a.Reason != emm.MemoryError {
			t.Errorf("page %d: %v %v", i+2, a.Kind, a.Reason)
		}
	}
	if kr := k.Write(5*ps, was[5*ps:6*ps]); kr == emm.Success {
		t.Error("a page was written behind what was cut off")
	}
	if kr := k.Write(0, was[:ps]); kr != emm.Success {
		t.Errorf("a page that is there: %v", kr)
	}
	if st, _ := f.Stat(); st.Size() != 2*ps+10 {
		t.Errorf("the file has %d bytes", st.Size())
	}
	if _, err := f.WriteAt(was, 0); err != nil {
		t.Fatal(err)
	}
	supplied(t, k.Read(emm.Run{Off: 5 * ps, Size: ps})[0], was[5*ps:6*ps]) // in order again
	if kr := k.Write(5*ps, was[5*ps:6*ps]); kr != emm.Success {
		t.Error(kr)
	}
}

// What a page's neighbour has is not the page's fault.
func TestErrorOfOnePage(t *testing.T) {
	m := &memory{b: emmtest.Fill(16, ps, 3)}
	var bad atomic.Bool
	r := readerFunc(func(p []byte, off int64) (int, error) {
		if bad.Load() && off <= 5*ps && off+int64(len(p)) > 5*ps {
			n, _ := m.ReadAt(p[:5*ps-off], off)
			return n, unix.EIO
		}
		return m.ReadAt(p, off)
	})
	k := foreign(t, ReaderAt(r, 16*ps, &Options{Log: quiet}))
	bad.Store(true)
	all := emm.Run{Off: 0, Size: 16 * ps}
	for need, failed := range map[int64][2]int{0: {5, 16}, 5: {5, 16}, 9: {5, 9}, 15: {5, 15}} {
		for i, a := range k.Ask(all, need*ps).Wait() {
			if i >= failed[0] && i < failed[1] {
				if a.Kind != emmtest.Failed || a.Reason != emm.MemoryError {
					t.Errorf("need %d: page %d: %v %v", need, i, a.Kind, a.Reason)
				}
				continue
			}
			supplied(t, a, m.b[i*ps:(i+1)*ps])
		}
	}
	bad.Store(false)
	supplied(t, k.Read(all)[5], m.b[5*ps:6*ps])
}

type readerFunc func(p []byte, off int64) (int, error)

func (f readerFunc) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }

// What a ReadAt must not do is an error, and io.EOF at the very end is none.
func TestReaderAtRules(t *testing.T) {
	for name, c := range map[string]struct {
		n    func(want int) int
		err  error
		good bool
	}{
		"all":               {func(n int) int { return n }, nil, true},
		"all and EOF":       {func(n int) int { return n }, io.EOF, true},
		"all and an error":  {func(n int) int { return n }, unix.EIO, false},
		"short":             {func(n int) int { return n - 1 }, nil, false},
		"short and EOF":     {func(n int) int { return n - 1 }, io.EOF, false},
		"more":              {func(n int) int { return n + 1 }, nil, false},
		"less than nothing": {func(n int) int { return -1 }, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			k := foreign(t, ReaderAt(readerFunc(func(p []byte, off int64) (int, error) { return c.n(len(p)), c.err }), ps+1, &Options{Log: quiet}))
			for _, a := range []emmtest.Answer{k.Read(emm.Run{Off: 0, Size: ps})[0], k.Read(emm.Run{Off: ps, Size: ps})[0]} {
				if (a.Kind == emmtest.Supplied) != c.good || !c.good && a.Reason != emm.MemoryError {
					t.Errorf("%v %v", a.Kind, a.Reason)
				}
			}
		})
	}
	k := foreign(t, ReaderAt(readerFunc(func([]byte, int64) (int, error) { return 0, emm.MemoryFailure }), ps, &Options{Log: quiet}))
	if a := k.Read(emm.Run{Off: 0, Size: ps})[0]; a.Reason != emm.MemoryFailure {
		t.Errorf("an error that is a kern_return_t: %v", a.Reason)
	}
}

func TestReadOnly(t *testing.T) {
	p := openFile(t, reopen(t, tempFile(t, make([]byte, ps)), os.O_RDONLY), ps)
	k := foreign(t, p)
	if p.MaxProtection() != emm.ProtRead {
		t.Error("a file open read-only may be mapped for writing")
	}
	if kr := k.Write(0, make([]byte, ps)); kr != emm.ProtectionFailure {
		t.Error(kr)
	}
	if kr := k.Synchronize(emm.Run{Off: 0, Size: ps}).Wait(); kr != emm.Success {
		t.Error(kr)
	}
}

// Synchronisations that come together are one call, and each call covers what was written before.
func TestSyncTogether(t *testing.T) {
	var calls atomic.Int32
	held := make(chan struct{})
	fail := atomic.Bool{}
	p := ReaderWriterAt(&memory{b: make([]byte, 64*ps)}, 64*ps, func() error {
		calls.Add(1)
		<-held
		if fail.Load() {
			return unix.EIO
		}
		return nil
	}, &Options{Log: quiet})
	k := foreign(t, p)
	run := func(i int) emm.Run { return emm.Run{Off: int64(i) * ps, Size: ps} }
	syncs := []*emmtest.Sync{k.Synchronize(run(0))}
	for end := time.Now().Add(10 * time.Second); calls.Load() == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	for i := range 20 {
		syncs = append(syncs, k.Synchronize(run(i)))
	}
	k.Write(0, emmtest.Fill(1, ps, 1)) // not behind the sync
	close(held)
	for _, s := range syncs {
		if kr := s.Wait(); kr != emm.Success {
			t.Error(kr)
		}
	}
	if n := calls.Load(); n != 2 {
		t.Errorf("%d calls, want 2", n)
	}
	fail.Store(true)
	if kr := k.Synchronize(run(0)).Wait(); kr != emm.MemoryError {
		t.Error(kr)
	}
	fail.Store(false)
	if kr := k.Synchronize(run(0)).Wait(); kr != emm.Success {
		t.Error(kr)
	}
}

// After fdatasync has failed nobody is told that anything is safe.
func TestSyncFailsForGood(t *testing.T) {
	f := tempFile(t, make([]byte, ps))
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	c := &file{f: f, raw: raw, size: ps}
	f.Close() // fdatasync fails
	for range 2 {
		if err := c.sync(); !errors.Is(err, emm.MemoryFailure) {
			t.Fatal(err)
		}
	}
	c.f = reopen(t, f, os.O_RDWR)
	defer c.f.Close()
	if c.raw, err = c.f.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	if err := c.sync(); !errors.Is(err, emm.MemoryFailure) {
		t.Fatalf("safe again: %v", err)
	}
}

// No more calls at once than there may be, reads not behind writes, and one read for a request.
func TestWorkers(t *testing.T) {
	m := &memory{b: make([]byte, 256*ps)}
	hold := make(chan struct{})
	m.trouble = func(off int64) error {
		if off < 128*ps { // the writes
			<-hold
		}
		return nil
	}
	k := foreign(t, ReaderWriterAt(m, 256*ps, nil, &Options{Log: quiet, Workers: 4}))
	var loans []*emmtest.Loan
	for i := range int64(64) {
		loans = append(loans, k.Give(i*ps, make([]byte, ps), false))
	}
	k.Ask(emm.Run{Off: 128 * ps, Size: 128 * ps}, 200*ps).Wait() // with all the writes stuck
	k.Ask(emm.Run{Off: 128 * ps, Size: ps}, -1).Wait()
	close(hold)
	for _, l := range loans {
		if kr := l.Wait(); kr != emm.Success {
			t.Error(kr)
		}
	}
	if n, calls := m.most.Load(), m.calls.Load(); n > 4 || calls != 66 {
		t.Errorf("%d at once, %d calls", n, calls)
	}
}

// Close waits for nobody, and what it closes is closed once, when nobody is in it.
func TestCloseUnderWay(t *testing.T) {
	m := &memory{b: make([]byte, ps)}
	hold, in := make(chan struct{}), make(chan struct{})
	m.trouble = func(int64) error { close(in); <-hold; return nil }
	p := ReaderAt(m, ps, &Options{Log: quiet})
	k := emmtest.NewKernel(t, p, emm.NewPort(), ps)
	k.Init()
	k.Ask(emm.Run{Off: 0, Size: ps}, 0)
	<-in
	k.Terminate()
	for range 2 {
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if m.closed.Load() != 0 {
		t.Fatal("closed under a read")
	}
	if kr := k.Init(); kr != emm.InvalidObject {
		t.Errorf("Init after Close: %v", kr)
	}
	close(hold)
	waitIdle(t, p)
	time.Sleep(2 * emmtest.Grace) // what comes now is a violation
	k.Check()
	if n := m.closed.Load(); n != 1 {
		t.Errorf("closed %d times", n)
	}
}

func TestFileRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path  string
		flags int
		size  int64
		want  error
	}{
		{path, os.O_WRONLY, 100, unix.EBADF},
		{path, unix.O_PATH, 100, unix.EBADF},
		{path, os.O_RDWR | os.O_APPEND, 100, unix.EINVAL},
		{path, os.O_RDWR, 0, emm.InvalidArgument},
		{path, os.O_RDWR, -1, emm.InvalidArgument},
		{dir, os.O_RDONLY, 100, unix.EINVAL},
		{fifo, os.O_RDWR, 100, unix.EINVAL},
		{"/dev/null", os.O_RDWR, 100, unix.EINVAL},
	} {
		f, err := os.OpenFile(c.path, c.flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := File(f, c.size, nil); !errors.Is(err, c.want) {
			t.Errorf("%s, flags %#x, size %d: %v", c.path, c.flags, c.size, err)
		}
		if _, err := f.Stat(); err != nil {
			t.Errorf("%s was closed: %v", c.path, err)
		}
		f.Close()
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := FileSize(f); n != 100 || err != nil {
		t.Errorf("size %d, %v", n, err)
	}
}
