package frames

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// heir opens a pool on what p leaves when its process is killed: mount and files, whose descriptors somebody else holds.
func heir(t *testing.T, p *Pool, budget int64) *Pool {
	t.Helper()
	s := p.State()
	q, err := Open(Options{Budget: budget, Adopt: &s, Mount: dupFile(t, p.Mount())})
	must(t, err)
	t.Cleanup(func() { must(t, q.Close()) })
	return q
}

// dupFile is nil for -1.
func dupFile(t *testing.T, fd int) *os.File {
	t.Helper()
	if fd < 0 {
		return nil
	}
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	return os.NewFile(uintptr(n), "kept")
}

func TestAdopt(t *testing.T) {
	forKinds(t, 32<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 4<<20)
		data := fill(ExtentSize, 7)
		if _, err := f.WriteAt(data, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(data[:PageSize], ExtentSize); err != nil { // may be a whole folio
			t.Fatal(err)
		}
		if _, err := f.Punch(ExtentSize+PageSize, ExtentSize-PageSize); err != nil {
			t.Fatal(err)
		}
		task, err := f.Dup()
		must(t, err)
		defer task.Close()
		must(t, task.Truncate(ExtentSize)) // what a rogue does meanwhile

		q := heir(t, p, 32<<20)
		if q.Kind() != p.Kind() || q.Extents() != p.Extents() || q.NoSwap() != p.NoSwap() || q.Budget() != 32<<20 {
			t.Fatalf("%v, extents %v, noswap %v, budget %d", q.Kind(), q.Extents(), q.NoSwap(), q.Budget())
		}
		g, err := q.AdoptFile(dupFile(t, f.Fd()), 4<<20)
		must(t, err)
		q.Claim(ExtentFrames + 1)
		if n := q.Reserved(); n != ExtentFrames+1 {
			t.Fatalf("%d frames reserved", n)
		}
		if n, err := q.Recount(); n != 0 || err != nil {
			t.Fatalf("%d bytes are nobody's, %v", n, err)
		}
		got := make([]byte, 4<<20)
		must(t, g.ReadAt(got, 0))
		if !bytes.Equal(got[:ExtentSize], data) || !bytes.Equal(got[ExtentSize:], make([]byte, 2<<20)) {
			t.Fatal("the file is not what it was, but for what was cut off")
		}
		// The budget can be changed, in the kernel too.
		must(t, q.SetBudget(4<<20))
		if q.Kind() != Memfd {
			h := newFile(t, q, 8<<20)
			if _, err := h.WriteAt(make([]byte, 6<<20), 0); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("6 MiB under a budget of 4: %v", err)
			}
			must(t, h.Close())
		}
		if left, err := g.Punch(0, 4<<20); left != 0 || err != nil {
			t.Fatalf("%d bytes left, %v", left, err)
		}
		q.Release(ExtentFrames + 1)
		must(t, g.Close())
		if n := q.Reserved(); n != 0 {
			t.Errorf("%d frames reserved at the end", n)
		}
	})
}

// More than the budget may be in use already; then nothing can be reserved until enough has gone.
func TestAdoptBeyondTheBudget(t *testing.T) {
	forKinds(t, 32<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 4<<20)
		if _, err := f.WriteAt(fill(4<<20, 1), 0); err != nil {
			t.Fatal(err)
		}
		q := heir(t, p, 2<<20)
		want := int64(32 << 20) // the kernel's limit is not below what is in use
		if q.Kind() == Memfd {
			want = 2 << 20
		}
		if q.Budget() != want {
			t.Fatalf("budget %d, want %d", q.Budget(), want)
		}
		g, err := q.AdoptFile(dupFile(t, f.Fd()), 4<<20)
		must(t, err)
		q.Claim(q.Budget()/PageSize + 10)
		if q.Reserve(1) || q.ReserveUpTo(5) != 0 {
			t.Error("reserved beyond the budget")
		}
		if err := q.SetBudget(q.Budget() - PageSize); !errors.Is(err, unix.EBUSY) {
			t.Errorf("a smaller budget: %v", err)
		}
		q.Release(11)
		if !q.Reserve(1) || q.Reserve(1) {
			t.Error("one frame was free")
		}
		q.Release(int(q.Budget() / PageSize))
		must(t, g.Close())
	})
}

// The file of an object that has ended is let go of when the last task lets go, also if the pager died in between; without a descriptor its frames are nobody's.
func TestAdoptClosed(t *testing.T) {
	forKinds(t, 32<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 1<<20)
		released := 0
		f.OnRelease(func() { released++ })
		kept := dupFile(t, f.Fd())
		task, err := f.Dup()
		must(t, err)
		must(t, f.Close())
		if released != 0 || p.Left() != 1 {
			t.Fatalf("released %d times, %d left, though a task has it", released, p.Left())
		}
		q := heir(t, p, 32<<20)
		stray := newFile(t, p, 1<<20) // its descriptor dies with p
		if _, err := stray.WriteAt(fill(1<<20, 1), 0); err != nil {
			t.Fatal(err)
		}
		must(t, unix.Fallocate(int(task.Fd()), 0, 0, PageSize))
		must(t, q.AdoptClosed(kept, func() { released++ }))
		if q.Left() != 1 || released != 0 {
			t.Fatalf("%d left, released %d times", q.Left(), released)
		}
		want := int64(1 << 20)
		if q.Kind() == Memfd {
			want = 0
		}
		if n, err := q.Recount(); n != want || err != nil || q.Reserved() != want/PageSize {
			t.Fatalf("%d bytes are nobody's, %d frames reserved, want %d; %v", n, q.Reserved(), want, err)
		}
		must(t, unix.Fallocate(int(task.Fd()), 0, 0, PageSize))
		if q.Reap() == 0 {
			t.Error("what a task put into a closed file stays")
		}
		task.Close()
		must(t, stray.Close()) // the last who had it
		if q.Reap(); q.Left() != 0 || released != 1 || q.Reserved() != 0 {
			t.Errorf("%d left, released %d times, %d frames reserved", q.Left(), released, q.Reserved())
		}
	})
}

func TestAdoptRefuses(t *testing.T) {
	p := newPool(t, Tmpfs, 8<<20)
	s, m := p.State(), newPool(t, Memfd, 8<<20).State()
	null, err := os.Open("/dev/null")
	must(t, err)
	defer null.Close()
	proc, err := os.Open("/proc")
	must(t, err)
	defer proc.Close()
	for _, o := range []Options{{Adopt: &s}, {Adopt: &m, Mount: proc}, {Adopt: &State{}}, {Adopt: &s, Mount: proc}} {
		o.Budget = 8 << 20
		if q, err := Open(o); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%+v: %v", *o.Adopt, err)
			if err == nil {
				q.Close()
			}
		}
	}
	other := newFile(t, newPool(t, Tmpfs, 8<<20), PageSize)
	foreign := dupFile(t, other.Fd())
	defer foreign.Close()
	for _, f := range []*os.File{null, proc, foreign} {
		if _, err := p.AdoptFile(f, PageSize); err == nil {
			t.Errorf("took over %s", f.Name())
		}
	}
	must(t, other.Close())
}
