package frames

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestReserve(t *testing.T) {
	forKinds(t, 10*PageSize+4095, kinds, func(t *testing.T, p *Pool) {
		if p.Budget() != 10*PageSize {
			t.Fatalf("budget %d", p.Budget())
		}
		steps := []struct {
			got, want any
		}{
			{p.Reserve(0), true}, {p.Reserve(11), false}, {p.Reserve(4), true}, {p.Reserved(), int64(4)},
			{p.Reserve(7), false}, {p.ReserveUpTo(0), 0}, {p.ReserveUpTo(-3), 0}, {p.ReserveUpTo(100), 6}, {p.ReserveUpTo(1), 0},
			{p.Reserve(1), false}, {p.Reserved(), int64(10)},
		}
		for i, s := range steps {
			if s.got != s.want {
				t.Errorf("step %d: %v, want %v", i, s.got, s.want)
			}
		}
		p.Release(10)
		p.Release(0)
		if p.Reserved() != 0 {
			t.Errorf("%d reserved", p.Reserved())
		}
	})
}

func TestOverRelease(t *testing.T) {
	p := newPool(t, Memfd, 4*PageSize)
	defer func() {
		if recover() == nil {
			t.Error("more released than reserved: no panic")
		}
	}()
	p.Release(1)
}

// In production the count is mended and the budget holds.
func TestOverReleaseMends(t *testing.T) {
	defer func(b func(string)) { broken = b }(broken)
	broken = nil
	p := newPool(t, Memfd, 4*PageSize)
	p.Release(3)
	if p.Reserve(5) || !p.Reserve(4) {
		t.Error("the budget did not hold")
	}
}

// Whatever runs at once, reserved frames never exceed the budget in force, also while it changes.
func TestReserveConcurrent(t *testing.T) {
	const small, large = 40, 64
	forKinds(t, large*PageSize, kinds, func(t *testing.T, p *Pool) {
		var held, limit atomic.Int64 // limit: the most that may be held now
		limit.Store(large)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(w), 1))
				for {
					select {
					case <-stop:
						return
					default:
					}
					n := 1 + rnd.IntN(12)
					if w%2 == 0 {
						n = p.ReserveUpTo(n)
					} else if !p.Reserve(n) {
						continue
					}
					if h := held.Add(int64(n)); h > limit.Load() {
						t.Errorf("%d frames held, at most %d", h, limit.Load())
					}
					held.Add(int64(-n))
					p.Release(n)
				}
			})
		}
		var down, refused int
		for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
			if err := p.SetBudget(small * PageSize); err != nil {
				wantErr(t, err, unix.EBUSY)
				refused++
				continue
			}
			down++
			limit.Store(small)
			time.Sleep(100 * time.Microsecond)
			limit.Store(large)
			must(t, p.SetBudget(large*PageSize))
		}
		close(stop)
		wg.Wait()
		if down == 0 {
			t.Errorf("the budget never went down (%d refused)", refused)
		}
		if p.Reserved() != 0 {
			t.Errorf("%d frames reserved at the end", p.Reserved())
		}
	})
}

func TestSetBudget(t *testing.T) {
	forKinds(t, 64*PageSize, kinds, func(t *testing.T, p *Pool) {
		for _, n := range []int64{0, -1, PageSize - 1} {
			wantErr(t, p.SetBudget(n), unix.EINVAL)
		}
		if !p.Reserve(32) {
			t.Fatal("reserve")
		}
		wantErr(t, p.SetBudget(31*PageSize), unix.EBUSY)
		if p.Budget() != 64*PageSize || p.Reserved() != 32 {
			t.Fatalf("a refused change changed: budget %d, %d reserved", p.Budget(), p.Reserved())
		}
		must(t, p.SetBudget(32*PageSize))
		if p.Reserve(1) {
			t.Fatal("reserved beyond a smaller budget")
		}
		must(t, p.SetBudget(32*PageSize))
		must(t, p.SetBudget(100*PageSize))
		if !p.Reserve(68) || p.Reserve(1) {
			t.Fatal("a larger budget is not what can be reserved")
		}
	})
}

// The kernel's limit follows, up and down, also after a reconfiguration failed and used its fd up; and the mount keeps its other options.
func TestSetBudgetKernel(t *testing.T) {
	forKinds(t, 64*PageSize, []Kind{Tmpfs, TmpfsUserNS}, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 4<<20)
		c := newCopier(t, f)
		fillTo := func(pages int64) { // to the limit and not a page more
			t.Helper()
			got, err := f.Blocks()
			must(t, err)
			for i := got / PageSize; i < pages; i++ {
				must(t, c.copy(i*PageSize, fill(PageSize, 1)))
			}
			wantErr(t, c.copy(pages*PageSize, fill(PageSize, 1)), unix.ENOMEM)
		}
		fillTo(64)
		wantErr(t, p.SetBudget(63*PageSize), unix.EBUSY) // nothing is reserved: the kernel's own count refuses
		must(t, p.SetBudget(80*PageSize))
		fillTo(80)
		if p.mount.ctl < 0 {
			t.Fatal("no fd kept for the next change")
		}
		must(t, unix.FsconfigSetString(p.mount.ctl, "size", "4096"))
		wantErr(t, unix.FsconfigReconfigure(p.mount.ctl), unix.EINVAL)
		must(t, p.SetBudget(90*PageSize))
		fillTo(90)
		if left, err := f.Punch(0, 60*PageSize); left != 0 || err != nil {
			t.Fatal(left, err)
		}
		must(t, p.SetBudget(30*PageSize))
		wantErr(t, c.copy(0, fill(PageSize, 1)), unix.ENOMEM)
		must(t, p.SetBudget(8<<20))
		if _, err := f.WriteAt([]byte{1}, 2<<20); err != nil {
			t.Fatal(err)
		}
		wantBlocks(t, f, 30+ExtentFrames) // huge=within_size is still in force
	})
}

// TestResizeBy: from then on somebody else sets the size of the mount, and what he refuses does not happen.
func TestResizeBy(t *testing.T) {
	p := newPool(t, Tmpfs, 64*PageSize)
	var asked []int64
	refuse := false
	err := p.ResizeBy(func(mountfd, ctlfd int, size int64) error {
		if refuse {
			return unix.EPERM
		}
		asked = append(asked, size)
		return SetMountSize(mountfd, -1, size)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.SetBudget(32 * PageSize); err != nil {
		t.Fatal(err)
	}
	refuse = true
	for _, n := range []int64{16, 48} {
		if err := p.SetBudget(n * PageSize); !errors.Is(err, unix.EPERM) {
			t.Errorf("refused: %v", err)
		}
	}
	if want := []int64{64 * PageSize, 32 * PageSize}; !slices.Equal(asked, want) || p.Budget() != 32*PageSize || !p.Reserve(32) || p.Reserve(1) {
		t.Errorf("asked for %v, want %v; the budget is %d", asked, want, p.Budget())
	}
}
