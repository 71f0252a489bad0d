package frames

import (
	"errors"
	"log/slog"
	"os"
	"runtime/pprof"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/uffd"
)

// children are the roles that a re-executed test binary plays, by argv[0].
var children = map[string]func(){}

func TestMain(m *testing.M) {
	MountMain()
	if child := children[os.Args[0]]; child != nil {
		child()
		os.Exit(0)
	}
	broken = func(what string) { panic(what) }
	code := m.Run()
	if leak := openFds(); code == 0 && leak != "" {
		os.Stderr.WriteString("leaked fds: " + leak + "\n")
		code = 1
	}
	os.Exit(code)
}

// openFds lists the descriptors that pools make.
func openFds() string {
	dir, _ := os.ReadDir("/proc/self/fd")
	var list []string
	for _, e := range dir {
		name, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && (strings.HasPrefix(name, "/memfd:") || strings.Contains(name, "[fscontext]") || strings.Contains(name, "[userfaultfd]") ||
			strings.HasPrefix(name, "socket:") || strings.HasPrefix(name, "/#") || name == "/" || strings.Contains(name, "(deleted)")) {
			list = append(list, e.Name()+"="+name)
		}
	}
	return strings.Join(list, " ")
}

var kinds = []Kind{Tmpfs, TmpfsUserNS, Memfd}

// forKinds runs a test for every kind of pool; budget in bytes.
func forKinds(t *testing.T, budget int64, list []Kind, fn func(t *testing.T, p *Pool)) {
	t.Helper()
	for _, k := range list {
		t.Run(k.String(), func(t *testing.T) { fn(t, newPool(t, k, budget)) })
	}
}

func newPool(t *testing.T, k Kind, budget int64) *Pool {
	t.Helper()
	watchdog := time.AfterFunc(60*time.Second, func() {
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
		panic(t.Name() + " hangs")
	})
	t.Cleanup(func() { watchdog.Stop() })
	p, err := Open(Options{Budget: budget, Kind: k, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	if p.Kind() != k {
		t.Fatalf("kind %v, want %v", p.Kind(), k)
	}
	return p
}

func newFile(t *testing.T, p *Pool, size int64) *File {
	t.Helper()
	f, err := p.NewFile(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// copier fills pages of a file by UFFDIO_COPY through a mapping that nothing touches.
type copier struct {
	u    *uffd.FD
	base uint64
}

func newCopier(t *testing.T, f *File) *copier {
	t.Helper()
	mem, err := unix.Mmap(f.Fd(), 0, int(f.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	u, err := openUffd()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	base := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))
	if _, err := u.Register(base, uint64(len(mem)), uffd.RegisterMissing); err != nil {
		t.Fatal(err)
	}
	return &copier{u, base}
}

func (c *copier) copy(off int64, b []byte) error {
	_, err := c.u.Copy(c.base+uint64(off), b, 0)
	return err
}

func fill(n int, b byte) []byte {
	s := make([]byte, n)
	for i := range s {
		s[i] = b
	}
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func wantBlocks(t *testing.T, f *File, pages int64) {
	t.Helper()
	if n, err := f.Blocks(); err != nil || n != pages*PageSize {
		t.Fatalf("%d bytes charged, %v, want %d pages", n, err, pages)
	}
}
