package frames

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenProbes(t *testing.T) {
	for _, budget := range []int64{PageSize, 8 * PageSize, 1 << 20, 64 << 20} {
		t.Run(fmt.Sprint(budget), func(t *testing.T) {
			forKinds(t, budget, kinds, func(t *testing.T, p *Pool) {
				tmpfs := p.Kind() != Memfd
				if p.Extents() != tmpfs {
					t.Errorf("extents %v", p.Extents())
				}
				if p.NoSwap() != (p.Kind() == Tmpfs) {
					t.Errorf("noswap %v", p.NoSwap())
				}
				if n, err := p.Usage(); err != nil || n != 0 {
					t.Errorf("%d bytes in use, %v: the probe left something", n, err)
				}
				if p.Budget() != budget || p.Reserved() != 0 {
					t.Errorf("budget %d, %d reserved", p.Budget(), p.Reserved())
				}
			})
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, o := range []Options{{}, {Budget: PageSize - 1}, {Budget: -1}, {Budget: 1 << 20, Kind: 17}} {
		_, err := Open(o)
		wantErr(t, err, unix.EINVAL)
	}
}

// The budget as the kernel enforces it is exact to the page, by both ways of filling.
func TestKernelEnforcesBudget(t *testing.T) {
	const pages = 64
	forKinds(t, pages*PageSize, []Kind{Tmpfs, TmpfsUserNS}, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 4<<20)
		c := newCopier(t, f)
		for i := range int64(pages) {
			must(t, c.copy(i*PageSize, fill(PageSize, byte(i))))
		}
		wantErr(t, c.copy(pages*PageSize, fill(PageSize, 1)), unix.ENOMEM)
		_, err := f.WriteAt(fill(PageSize, 1), pages*PageSize)
		wantErr(t, err, unix.ENOSPC)
		wantBlocks(t, f, pages)
		if n, err := p.Usage(); err != nil || n != p.Budget() {
			t.Fatalf("usage %d, %v, budget %d", n, err, p.Budget())
		}
		if left, err := f.Punch(0, 10*PageSize); left != 0 || err != nil {
			t.Fatal(left, err)
		}
		n, err := f.WriteAt(fill(20*PageSize, 2), 100*PageSize)
		wantErr(t, err, unix.ENOSPC)
		if n != 10*PageSize {
			t.Fatalf("%d bytes written before there was no frame, want %d", n, 10*PageSize)
		}
		wantBlocks(t, f, pages)
		b := make([]byte, n)
		must(t, f.ReadAt(b, 100*PageSize))
		if !bytes.Equal(b, fill(n, 2)) {
			t.Fatal("short write: wrong contents")
		}
	})
}

func TestExtents(t *testing.T) {
	forKinds(t, 2*ExtentSize, []Kind{Tmpfs, TmpfsUserNS}, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 4*ExtentSize)
		data := fill(ExtentSize, 7)
		for i := range int64(2) {
			if n, err := f.WriteAt(data, i*ExtentSize); n != ExtentSize || err != nil {
				t.Fatal(n, err)
			}
		}
		wantBlocks(t, f, 2*ExtentFrames)
		n, err := f.WriteAt(data, 2*ExtentSize)
		wantErr(t, err, unix.ENOSPC)
		if n != 0 {
			t.Fatalf("%d bytes written beyond the budget", n)
		}
		for i := range int64(ExtentFrames) { // page by page, every other one first
			page := (i*2)%ExtentFrames + i*2/ExtentFrames
			if left, err := f.Punch(page*PageSize, PageSize); left != 0 || err != nil {
				t.Fatal(left, err)
			}
			wantBlocks(t, f, 2*ExtentFrames-i-1)
		}
		b := make([]byte, ExtentSize)
		must(t, f.ReadAt(b, ExtentSize))
		if !bytes.Equal(b, data) {
			t.Fatal("the other extent changed")
		}
	})
}

func TestUsageCounts(t *testing.T) {
	forKinds(t, 16<<20, kinds, func(t *testing.T, p *Pool) {
		f, g := newFile(t, p, 1<<20), newFile(t, p, 1<<20)
		must(t, newCopier(t, f).copy(0, fill(3*PageSize, 1)))
		must(t, newCopier(t, g).copy(0, fill(4*PageSize, 1)))
		if n, err := p.Usage(); err != nil || n != 7*PageSize {
			t.Fatal(n, err)
		}
	})
}

func TestPoolClose(t *testing.T) {
	forKinds(t, 1<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, PageSize)
		must(t, p.Close())
		must(t, p.Close())
		_, err := p.NewFile(PageSize)
		wantErr(t, err, os.ErrClosed)
		_, err = p.Usage()
		wantErr(t, err, os.ErrClosed)
		wantErr(t, p.SetBudget(2<<20), os.ErrClosed)
		if _, err := f.WriteAt([]byte("still there"), 0); err != nil {
			t.Fatal(err)
		}
		ro, err := f.ReadOnly()
		must(t, err)
		defer ro.Close()
		b := make([]byte, 11)
		if _, err := ro.ReadAt(b, 0); err != nil || string(b) != "still there" {
			t.Fatalf("%q, %v", b, err)
		}
	})
}

// Auto takes the first kind that works and says why it was not a better one.
func TestFallback(t *testing.T) {
	errHere, errUser := errors.New("no privilege"), errors.New("no namespaces")
	fail := func(err error) func(int64, bool) (*mount, error) {
		return func(int64, bool) (*mount, error) { return nil, err }
	}
	var calls int
	late := func(size int64, huge bool) (*mount, error) { // the second mount, without huge pages, fails
		if calls++; calls > 1 {
			return nil, errHere
		}
		m, err := mountHere(size, huge)
		if err == nil {
			unix.Close(m.fd)
			m.fd, _ = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0) // so the probe fails
		}
		return m, err
	}
	for _, c := range []struct {
		name string
		kind Kind
		list []attempt
		want Kind
		errs []error
		logs []string
	}{
		{"tmpfs", Auto, attempts, Tmpfs, nil, nil},
		{"userns", Auto, []attempt{{Tmpfs, fail(errHere)}, attempts[1], attempts[2]}, TmpfsUserNS, nil, []string{"tmpfs: no privilege"}},
		{"memfd", Auto, []attempt{{Tmpfs, fail(errHere)}, {TmpfsUserNS, fail(errUser)}, attempts[2]}, Memfd, nil,
			[]string{"tmpfs: no privilege", "tmpfs-userns: no namespaces"}},
		{"remount", Auto, []attempt{{Tmpfs, late}, attempts[2]}, Memfd, nil, []string{"large folios", "tmpfs: no privilege"}},
		{"forced", Tmpfs, []attempt{{Tmpfs, fail(errHere)}, attempts[2]}, 0, []error{errHere}, nil},
		{"none", Auto, []attempt{{Tmpfs, fail(errHere)}, {TmpfsUserNS, fail(errUser)}}, 0, []error{errHere, errUser}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var log bytes.Buffer
			p := &Pool{log: slog.New(slog.NewTextHandler(&log, nil)), files: make(map[*File]struct{})}
			p.budget.Store(16)
			p.free.Store(16)
			err := p.open(c.kind, c.list)
			defer p.Close()
			for _, want := range c.errs {
				wantErr(t, err, want)
			}
			if c.errs != nil {
				return
			}
			must(t, err)
			if p.Kind() != c.want {
				t.Errorf("kind %v, want %v", p.Kind(), c.want)
			}
			for _, want := range c.logs {
				if !strings.Contains(log.String(), want) {
					t.Errorf("log lacks %q:\n%s", want, &log)
				}
			}
			if c.logs == nil && log.Len() > 0 {
				t.Errorf("log says %s", &log)
			}
			f, err := p.NewFile(PageSize)
			must(t, err)
			must(t, f.Close())
		})
	}
}

// A mount without large folios is used with single pages.
func TestNoHuge(t *testing.T) {
	p := &Pool{log: slog.New(slog.DiscardHandler), files: make(map[*File]struct{})}
	p.budget.Store(1024)
	p.free.Store(1024)
	plain := func(size int64, _ bool) (*mount, error) { return mountHere(size, false) }
	must(t, p.open(Tmpfs, []attempt{{Tmpfs, plain}}))
	defer p.Close()
	if p.Extents() || !p.NoSwap() {
		t.Fatalf("extents %v, noswap %v", p.Extents(), p.NoSwap())
	}
	f := newFile(t, p, 4<<20)
	if _, err := f.WriteAt(fill(PageSize, 1), 0); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, f, 1)
}
