package frames

import (
	"testing"

	"golang.org/x/sys/unix"
)

// What a task keeps of a file that was closed is emptied, as often as it is filled, and let go of when the task lets go.
func TestReap(t *testing.T) {
	forKinds(t, 8<<20, kinds, func(t *testing.T, p *Pool) {
		f, err := p.NewFile(2 << 20)
		must(t, err)
		d, err := f.Dup()
		must(t, err)
		must(t, unix.Fallocate(int(d.Fd()), 0, 0, 1<<20))
		must(t, f.Close())
		for range 2 {
			if n, err := p.Usage(); n != 0 || err != nil {
				t.Fatalf("%d bytes in use, %v", n, err)
			}
			if p.Left() != 1 {
				t.Fatalf("%d files left, want the one that is open", p.Left())
			}
			must(t, unix.Fallocate(int(d.Fd()), 0, 3<<20, 1<<20))
			n, err := p.Usage()
			if n < 1<<20 || err != nil { // or more: a whole folio
				t.Fatalf("%d bytes in use, %v", n, err)
			}
			if got := p.Reap(); got != n {
				t.Fatalf("%d bytes freed, want %d", got, n)
			}
		}
		m, err := unix.Mmap(int(d.Fd()), 0, PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		must(t, err)
		d.Close()
		if p.Reap(); p.Left() != 1 {
			t.Fatal("a file that is mapped was let go of")
		}
		must(t, unix.Munmap(m))
		if p.Reap(); p.Left() != 0 {
			t.Fatal("a file that nobody else has was kept")
		}
		f = newFile(t, p, 1<<20)
		must(t, f.Close())
		if p.Left() != 0 {
			t.Fatal("a file that nobody else has was kept")
		}
	})
}

func TestTrim(t *testing.T) {
	forKinds(t, 8<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 1<<20)
		if _, err := f.WriteAt(fill(PageSize, 1), 0); err != nil {
			t.Fatal(err)
		}
		keep, err := f.Blocks()
		must(t, err)
		d, err := f.Dup()
		must(t, err)
		defer d.Close()
		for _, mode := range []uint32{0, unix.FALLOC_FL_KEEP_SIZE} {
			must(t, unix.Fallocate(int(d.Fd()), mode, 2<<20, 1<<20))
			if n, err := f.Trim(); n < 1<<20 || err != nil {
				t.Fatalf("%d bytes freed, %v", n, err)
			}
			wantBlocks(t, f, keep/PageSize)
		}
	})
}
