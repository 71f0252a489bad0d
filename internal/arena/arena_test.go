package arena

import (
	"bytes"
	"errors"
	"math"
	"os"
	"slices"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const kind, version = "pagetab", 3

func newArena(t testing.TB, max int64) *Arena {
	t.Helper()
	a, err := Create("test", kind, version, max)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// dup is what another process would receive.
func dup(t testing.TB, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	d := os.NewFile(uintptr(fd), "dup")
	t.Cleanup(func() { d.Close() })
	return d
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func TestGrowKeepsBase(t *testing.T) {
	a := newArena(t, 1<<40)
	if a.Bytes() != nil || a.Words() != nil || a.Size() != 0 {
		t.Fatal("a new arena is not empty")
	}
	must(t, a.Grow(1))
	first := a.Bytes()
	if len(first) != PageSize || len(a.Words()) != PageSize/8 || a.Size() != PageSize {
		t.Fatalf("%d bytes", len(first))
	}
	a.Words()[5].Store(0x1122334455667788)
	for size := int64(PageSize); size <= 8<<30; size *= 4 {
		must(t, a.Grow(size))
		b := a.Bytes()
		if int64(len(b)) != size || &b[0] != &first[0] {
			t.Fatalf("grown to %d: %d bytes at %p, was at %p", size, len(b), b, first)
		}
		if b[size-1] != 0 {
			t.Fatal("new memory is not zero")
		}
		b[size-1] = 1
	}
	must(t, a.Grow(0))
	must(t, a.Grow(-1))
	if a.Size() != 4<<30 {
		t.Fatalf("shrunk to %d", a.Size())
	}
	if first[40] != 0x88 || a.Words()[5].Load() != 0x1122334455667788 {
		t.Fatal("bytes and words are not the same memory")
	}
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		kind string
		max  int64
	}{{"", 1}, {"ninebytes", 1}, {"k", -1}, {"k", MaxSize + 1}, {"k", math.MaxInt64}} {
		_, err := Create("test", c.kind, 1, c.max)
		wantErr(t, err, unix.EINVAL)
	}
	a := newArena(t, PageSize+1)
	must(t, a.Grow(2*PageSize))
	for _, size := range []int64{2*PageSize + 1, math.MaxInt64} {
		wantErr(t, a.Grow(size), ErrTooLarge)
	}
	if a.Size() != 2*PageSize {
		t.Fatalf("%d bytes after refused growth", a.Size())
	}
	empty := newArena(t, 0)
	must(t, empty.Grow(0))
	wantErr(t, empty.Grow(1), ErrTooLarge)
}

func TestOpen(t *testing.T) {
	a := newArena(t, 1<<30)
	must(t, a.Grow(3*PageSize))
	copy(a.Bytes()[PageSize:], "what the dead one wrote")
	f := dup(t, a.File())
	must(t, a.Close())

	b, err := Open(f, kind, version, 1<<20)
	must(t, err)
	defer b.Close()
	if b.Size() != 3*PageSize || !bytes.HasPrefix(b.Bytes()[PageSize:], []byte("what the dead one wrote")) {
		t.Fatalf("%d bytes: %q", b.Size(), b.Bytes()[PageSize:PageSize+30])
	}
	must(t, b.Grow(1<<20))
	wantErr(t, b.Grow(1<<20+1), ErrTooLarge)
	if b.File() != f {
		t.Fatal("another file")
	}
}

// A predecessor that was killed while it grew leaves a file longer than committed.
func TestOpenHalfGrown(t *testing.T) {
	a := newArena(t, 1<<20)
	must(t, a.Grow(PageSize))
	f := dup(t, a.File())
	must(t, f.Truncate(PageSize+10*PageSize))
	b, err := Open(f, kind, version, 1<<20)
	must(t, err)
	defer b.Close()
	if b.Size() != PageSize {
		t.Fatalf("%d bytes", b.Size())
	}
	must(t, b.Grow(5*PageSize))
	if !bytes.Equal(b.Bytes(), make([]byte, 5*PageSize)) {
		t.Fatal("not zeros")
	}
	must(t, b.Grow(20*PageSize))
	b.Bytes()[20*PageSize-1] = 1
}

func TestOpenRefuses(t *testing.T) {
	good := func() *Arena {
		a := newArena(t, 1<<20)
		must(t, a.Grow(2*PageSize))
		return a
	}
	patch := func(off int64, b ...byte) func() *os.File {
		return func() *os.File {
			f := dup(t, good().File())
			_, err := f.WriteAt(b, off)
			must(t, err)
			return f
		}
	}
	memfd := func(size int64, flags, seals int) func() *os.File {
		return func() *os.File {
			fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|flags)
			must(t, err)
			f := os.NewFile(uintptr(fd), "test")
			t.Cleanup(func() { f.Close() })
			must(t, f.Truncate(size))
			page := make([]byte, PageSize)
			_, err = good().File().ReadAt(page, 0)
			must(t, err)
			if size >= PageSize {
				_, err = f.WriteAt(page, 0)
				must(t, err)
			}
			if seals != 0 {
				_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
				must(t, err)
			}
			return f
		}
	}
	plain := func() *os.File {
		f, err := os.CreateTemp(t.TempDir(), "arena")
		must(t, err)
		t.Cleanup(func() { f.Close() })
		must(t, f.Truncate(1<<20))
		return f
	}
	pipe := func() *os.File {
		r, w, err := os.Pipe()
		must(t, err)
		t.Cleanup(func() { r.Close(); w.Close() })
		return r
	}
	intact := func() *os.File { return dup(t, good().File()) }
	for name, c := range map[string]struct {
		file    func() *os.File
		kind    string
		version uint32
		max     int64
		want    error
	}{
		"magic":        {patch(3, 'x'), kind, version, 1 << 20, ErrFormat},
		"other kind":   {intact, "storemap", version, 1 << 20, ErrFormat},
		"longer kind":  {intact, kind + "x", version, 1 << 20, ErrFormat},
		"no kind":      {intact, "", version, 1 << 20, unix.EINVAL},
		"version":      {intact, kind, version + 1, 1 << 20, ErrVersion},
		"too large":    {intact, kind, version, PageSize, ErrTooLarge},
		"maximum":      {intact, kind, version, -1, unix.EINVAL},
		"odd size":     {patch(offCommitted, 1), kind, version, 1 << 20, ErrFormat},
		"beyond file":  {patch(offCommitted+1, 0x30), kind, version, 1 << 20, ErrFormat},
		"huge size":    {patch(offCommitted+7, 0x80), kind, version, 1 << 20, ErrFormat},
		"reserved":     {patch(offVersion+4, 1), kind, version, 1 << 20, ErrFormat},
		"end of page":  {patch(PageSize-1, 1), kind, version, 1 << 20, ErrFormat},
		"empty":        {memfd(0, unix.MFD_ALLOW_SEALING, seals), kind, version, 1 << 20, ErrFormat},
		"short header": {memfd(PageSize-1, unix.MFD_ALLOW_SEALING, seals), kind, version, 1 << 20, ErrFormat},
		"short data":   {memfd(2*PageSize, unix.MFD_ALLOW_SEALING, seals), kind, version, 1 << 20, ErrFormat},
		"can shrink":   {memfd(1<<20, unix.MFD_ALLOW_SEALING, 0), kind, version, 1 << 20, ErrFormat},
		"cannot grow":  {memfd(1<<20, unix.MFD_ALLOW_SEALING, seals|unix.F_SEAL_GROW), kind, version, 1 << 20, ErrFormat},
		"read-only":    {memfd(1<<20, unix.MFD_ALLOW_SEALING, seals|unix.F_SEAL_WRITE), kind, version, 1 << 20, ErrFormat},
		"plain file":   {plain, kind, version, 1 << 20, ErrFormat},
		"pipe":         {pipe, kind, version, 1 << 20, ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			f := c.file()
			a, err := Open(f, c.kind, c.version, c.max)
			if err == nil {
				a.Close()
			}
			wantErr(t, err, c.want)
			if _, err := f.Stat(); err != nil {
				t.Fatalf("the file is not the caller's any more: %v", err)
			}
		})
	}
}

// No header makes Open crash, or accept more than there is.
func FuzzOpen(f *testing.F) {
	h, _ := newHeader(kind, version)
	h.committed = PageSize
	f.Add(h.bytes(), int64(2*PageSize), int64(1<<20))
	f.Add(h.bytes(), int64(PageSize), int64(1<<20))
	f.Add(h.bytes()[:20], int64(100), int64(0))
	h.committed = math.MaxUint64
	f.Add(h.bytes(), int64(1<<20), int64(math.MaxInt64))
	f.Fuzz(func(t *testing.T, head []byte, size, max int64) {
		size &= 1<<24 - 1
		fd, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		must(t, err)
		file := os.NewFile(uintptr(fd), "fuzz")
		defer file.Close()
		_, err = file.WriteAt(head, 0)
		must(t, err)
		must(t, file.Truncate(size))
		_, err = unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals)
		must(t, err)
		a, err := Open(file, kind, version, max)
		if err != nil {
			return
		}
		defer a.Close()
		if a.Size() > max || a.Size() > size-PageSize || len(a.Words()) != len(a.Bytes())/8 {
			t.Fatalf("%d bytes of a file of %d, at most %d", a.Size(), size, max)
		}
		for i := range a.Words() {
			a.Words()[i].Load()
		}
		if err := a.Grow(a.Size() + 1); err == nil {
			a.Bytes()[a.Size()-1] = 1
		}
	})
}

func TestSealed(t *testing.T) {
	a := newArena(t, 1<<20)
	must(t, a.Grow(4*PageSize))
	f := dup(t, a.File())
	wantErr(t, f.Truncate(PageSize), unix.EPERM)
	_, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW)
	wantErr(t, err, unix.EPERM)
	i, err := f.Stat()
	if err != nil || i.Mode().Perm() != 0o600 {
		t.Fatal(i.Mode(), err)
	}
}

func TestDiscard(t *testing.T) {
	a := newArena(t, 1<<20)
	must(t, a.Grow(16*PageSize))
	b := a.Bytes()
	for i := range b {
		b[i] = 1
	}
	must(t, a.Discard(2*PageSize, 3*PageSize))    // whole pages
	must(t, a.Discard(7*PageSize-1, 2*PageSize))  // one of three touched is whole
	must(t, a.Discard(10*PageSize+1, PageSize-1)) // none is
	must(t, a.Discard(16*PageSize, 0))
	want := slices.Repeat([]byte{1}, len(b))
	clear(want[2*PageSize : 5*PageSize])
	clear(want[7*PageSize : 8*PageSize])
	if !bytes.Equal(b, want) {
		t.Fatal("wrong pages discarded")
	}
	for _, c := range [][2]int64{{-1, PageSize}, {0, -1}, {0, 16*PageSize + 1}, {17 * PageSize, 0}, {math.MaxInt64, math.MaxInt64}, {1, math.MaxInt64}} {
		wantErr(t, a.Discard(c[0], c[1]), unix.EINVAL)
	}
	if !bytes.Equal(b, want) {
		t.Fatal("a refused discard discarded")
	}
	var st unix.Stat_t
	must(t, a.Discard(0, 16*PageSize))
	must(t, unix.Fstat(int(a.File().Fd()), &st))
	if st.Blocks*512 > PageSize { // the header
		t.Fatalf("%d bytes still charged", st.Blocks*512)
	}
	page := make([]byte, PageSize)
	_, err := a.File().ReadAt(page, 0)
	must(t, err)
	if h, err := parse(page); err != nil || h.committed != 16*PageSize {
		t.Fatal("the header is gone", err)
	}
}

func TestData(t *testing.T) {
	a := newArena(t, 1<<40)
	list := func() (runs []int64) {
		a.Data(func(off, n int64) bool {
			runs = append(runs, off/PageSize, n/PageSize)
			return true
		})
		return runs
	}
	if got := list(); got != nil {
		t.Fatal(got)
	}
	must(t, a.Grow(64<<30))
	w := a.Words()
	if got := list(); got != nil {
		t.Fatal(got)
	}
	last := int64(64<<30)/PageSize - 1
	for _, page := range []int64{0, 1, 1000, 5_000_000, last} {
		w[page*PageSize/8+7].Store(1)
	}
	if got, want := list(), []int64{0, 2, 1000, 1, 5_000_000, 1, last, 1}; !slices.Equal(got, want) {
		t.Fatalf("data at %v, want %v", got, want)
	}
	must(t, a.Discard(1000*PageSize, PageSize))
	calls := 0
	a.Data(func(off, n int64) bool { // the callback may use the arena
		calls++
		must(t, a.Grow(a.Size()+1))
		return calls < 2
	})
	if calls != 2 {
		t.Fatalf("%d calls", calls)
	}
	if got, want := list(), []int64{0, 2, 5_000_000, 1, last, 1}; !slices.Equal(got, want) {
		t.Fatalf("data at %v, want %v", got, want)
	}
}

func TestClose(t *testing.T) {
	a := newArena(t, 1<<20)
	must(t, a.Grow(PageSize))
	must(t, a.Close())
	must(t, a.Close())
	wantErr(t, a.Grow(2*PageSize), os.ErrClosed)
	wantErr(t, a.Discard(0, 0), os.ErrClosed)
	a.Data(func(int64, int64) bool { t.Error("data after Close"); return false })
	if a.Bytes() != nil || a.Words() != nil || a.Size() != 0 {
		t.Error("memory after Close")
	}
	if _, err := a.File().Stat(); err == nil {
		t.Error("the fd is open after Close")
	}
}

// Words stay usable and visible while others make the arena grow.
func TestGrowConcurrent(t *testing.T) {
	a := newArena(t, 64<<20)
	must(t, a.Grow(2*PageSize)) // the first page keeps the counts, the last one is discarded
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 500 {
				if err := a.Grow(int64(i*4+g) * PageSize); err != nil {
					t.Error(err)
				}
				w := a.Words()
				w[g].Add(1)
				w[len(w)-1].Load()
				if i%50 == 0 {
					a.Data(func(off, n int64) bool { return off < 10*PageSize })
					if err := a.Discard(int64(len(w)*8)-PageSize, PageSize); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	for g := range 4 {
		if n := a.Words()[g].Load(); n != 500 {
			t.Errorf("word %d: %d", g, n)
		}
	}
	if uintptr(unsafe.Pointer(&a.Words()[0]))%PageSize != 0 {
		t.Error("not aligned")
	}
}
