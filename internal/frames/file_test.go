package frames

import (
	"bytes"
	"errors"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFileReadWrite(t *testing.T) {
	forKinds(t, 8<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 3*PageSize-1)
		if f.Size() != 3*PageSize {
			t.Fatalf("size %d", f.Size())
		}
		b := fill(3*PageSize, 0xff)
		must(t, f.ReadAt(b, 0))
		if !bytes.Equal(b, make([]byte, len(b))) {
			t.Fatal("a new file is not zeros")
		}
		wantBlocks(t, f, 0) // reading made no page
		data := fill(2*PageSize, 3)
		if n, err := f.WriteAt(data, PageSize); n != len(data) || err != nil {
			t.Fatal(n, err)
		}
		must(t, f.ReadAt(b, 0))
		if !bytes.Equal(b, append(make([]byte, PageSize), data...)) {
			t.Fatal("wrong contents")
		}
		if n, err := f.WriteAt(nil, 0); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		must(t, f.ReadAt(nil, 0))
		for _, off := range []int64{-1, PageSize + 1, 3 * PageSize, math.MaxInt64} {
			n, err := f.WriteAt(data, off)
			if wantErr(t, err, unix.EINVAL); n != 0 {
				t.Fatal(n)
			}
		}
		wantErr(t, f.ReadAt(b, -1), unix.EINVAL)
		wantErr(t, f.ReadAt(b, 1), io.ErrUnexpectedEOF)
	})
}

func TestFileTruncate(t *testing.T) {
	forKinds(t, 8<<20, kinds, func(t *testing.T, p *Pool) {
		_, err := p.NewFile(-1)
		wantErr(t, err, unix.EINVAL)
		_, err = p.NewFile(math.MaxInt64)
		if err == nil {
			t.Fatal("a file of 8 EiB")
		}
		f := newFile(t, p, 64<<30)
		must(t, newCopier(t, f).copy(64<<30-PageSize, fill(PageSize, 1)))
		wantBlocks(t, f, 1)
		must(t, f.Truncate(PageSize+1))
		wantBlocks(t, f, 0)
		if f.Size() != 2*PageSize {
			t.Fatalf("size %d", f.Size())
		}
		wantErr(t, f.Truncate(-1), unix.EINVAL)
		d, err := f.Dup()
		must(t, err)
		defer d.Close()
		must(t, d.Truncate(PageSize)) // as a task that may write could
		b := fill(2*PageSize, 0xff)
		must(t, f.ReadAt(b, 0))
		if !bytes.Equal(b, make([]byte, len(b))) {
			t.Fatal("what was cut off is not zeros")
		}
		wantErr(t, f.ReadAt(b, PageSize), io.ErrUnexpectedEOF)
	})
}

// What a writable task does with its descriptor's flags and offset does not reach the pager's.
func TestDup(t *testing.T) {
	forKinds(t, 8<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 2*PageSize)
		d, err := f.Dup()
		must(t, err)
		defer d.Close()
		if _, err := d.WriteAt([]byte("task"), 10); err != nil {
			t.Fatal(err)
		}
		flags, err := unix.FcntlInt(d.Fd(), unix.F_GETFL, 0)
		must(t, err)
		_, err = unix.FcntlInt(d.Fd(), unix.F_SETFL, flags|unix.O_APPEND)
		must(t, err)
		if _, err := f.WriteAt([]byte("pager"), 20); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 32)
		want := make([]byte, len(b))
		copy(want[10:], "task")
		copy(want[20:], "pager")
		if _, err := d.ReadAt(b, 0); err != nil || !bytes.Equal(b, want) {
			t.Fatalf("%q, %v", b, err)
		}
		if i, err := d.Stat(); err != nil || i.Size() != 2*PageSize {
			t.Fatalf("the file is %d bytes now, %v", i.Size(), err)
		}
		fd, err := unix.FcntlInt(d.Fd(), unix.F_GETFD, 0)
		if err != nil || fd&unix.FD_CLOEXEC == 0 {
			t.Fatal("not close-on-exec")
		}
	})
}

func TestReadOnly(t *testing.T) {
	forKinds(t, 8<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, PageSize)
		ro, err := f.ReadOnly()
		must(t, err)
		defer ro.Close()
		if _, err := ro.WriteAt([]byte{1}, 0); !errors.Is(err, unix.EBADF) {
			t.Fatalf("write: %v", err)
		}
		if err := ro.Truncate(0); err == nil {
			t.Fatal("truncated through a read-only descriptor")
		}
		if _, err := unix.Mmap(int(ro.Fd()), 0, PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EACCES) {
			t.Fatalf("map writable: %v", err)
		}
		mem, err := unix.Mmap(int(ro.Fd()), 0, PageSize, unix.PROT_READ, unix.MAP_PRIVATE)
		must(t, err)
		defer unix.Munmap(mem)
		if _, err := f.WriteAt([]byte("seen"), 0); err != nil {
			t.Fatal(err)
		}
		if string(mem[:4]) != "seen" {
			t.Fatalf("the mapping shows %q", mem[:4])
		}
	})
}

func TestFileClose(t *testing.T) {
	forKinds(t, 8<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, PageSize)
		must(t, f.Close())
		must(t, f.Close())
		if f.Fd() != -1 {
			t.Error("closed, but has a number")
		}
		_, werr := f.WriteAt([]byte{1}, 0)
		_, perr := f.Punch(0, PageSize)
		_, berr := f.Blocks()
		_, derr := f.Dup()
		_, rerr := f.ReadOnly()
		_, oerr := f.Occupied(0, PageSize)
		nerr := f.Present(0, PageSize, func(int64, int64) bool { return true })
		for _, err := range []error{f.ReadAt([]byte{1}, 0), f.Truncate(0), werr, perr, berr, derr, rerr, oerr, nerr} {
			wantErr(t, err, os.ErrClosed)
		}
		if n, err := p.Usage(); n != 0 || err != nil {
			t.Fatal(n, err)
		}
	})
}

// Close waits for who uses the descriptor: its number, recycled at once by others, is never written through.
func TestFileCloseRace(t *testing.T) {
	forKinds(t, 64<<20, kinds, func(t *testing.T, p *Pool) {
		decoy := newFile(t, p, PageSize)
		var wrong atomic.Int64
		for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end); {
			f, err := p.NewFile(4 * PageSize)
			must(t, err)
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					for b := fill(PageSize, 9); ; {
						_, err := f.WriteAt(b, 0)
						if err == nil {
							err = f.ReadAt(b, PageSize)
						}
						if err == nil {
							_, err = f.Punch(0, PageSize)
						}
						if err != nil {
							if !errors.Is(err, os.ErrClosed) {
								wrong.Add(1)
							}
							return
						}
						b = fill(PageSize, 9)
					}
				})
			}
			must(t, f.Close())
			d, err := decoy.Dup() // takes the number that has become free
			must(t, err)
			wg.Wait()
			must(t, d.Close())
		}
		if wrong.Load() != 0 {
			t.Errorf("%d errors other than closed", wrong.Load())
		}
		wantBlocks(t, decoy, 0)
	})
}

// A thousand files and some pools leave nothing behind.
func TestNoLeaks(t *testing.T) {
	count := func() int {
		dir, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(dir)
	}
	cycle := func(files int) {
		for _, k := range kinds {
			p, err := Open(Options{Budget: 1 << 20, Kind: k})
			must(t, err)
			for range files {
				f, err := p.NewFile(PageSize)
				must(t, err)
				if _, err := f.WriteAt([]byte{1}, 0); err != nil {
					t.Fatal(err)
				}
				must(t, f.Close())
			}
			if n, err := p.Usage(); n != 0 || err != nil {
				t.Fatal(n, err)
			}
			must(t, p.Close())
		}
	}
	cycle(1)
	before := count()
	for range 5 {
		cycle(200)
	}
	if after := count(); after != before {
		t.Errorf("%d fds, before %d: %s", after, before, openFds())
	}
	// Every helper was waited for.
	if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child is left: %d, %v", pid, err)
	}
}
