package frames

import (
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// Reserve takes n frames, all or none, and says whether it did. n < 1 takes nothing and succeeds. It never blocks.
func (p *Pool) Reserve(n int) bool {
	if n < 1 {
		return true
	}
	for {
		free := p.free.Load()
		if free < int64(n) {
			return false
		}
		if p.free.CompareAndSwap(free, free-int64(n)) {
			return true
		}
	}
}

// ReserveUpTo takes as many frames as there are, at most n, and says how many. It never blocks.
func (p *Pool) ReserveUpTo(n int) int {
	for {
		free := p.free.Load()
		take := min(free, int64(n))
		if take < 1 {
			return 0
		}
		if p.free.CompareAndSwap(free, free-take) {
			return int(take)
		}
	}
}

// Release gives n reserved frames back: pages that are verifiably out of their file, or were never filled.
func (p *Pool) Release(n int) {
	if n < 1 {
		return
	}
	budget := p.budget.Load()
	if free := p.free.Add(int64(n)); free > budget && free > p.budget.Load() {
		p.overReleased()
	}
}

// overReleased keeps the budget when more was released than reserved. The lock keeps SetBudget from changing one of the two words in between.
func (p *Pool) overReleased() {
	p.mu.Lock()
	defer p.mu.Unlock()
	budget := p.budget.Load()
	for free := p.free.Load(); free > budget; free = p.free.Load() {
		if broken != nil {
			broken(fmt.Sprintf("BUG: %d frames free of %d", free, budget))
		}
		if p.free.CompareAndSwap(free, budget) {
			p.log.Error("BUG: more frames released than reserved", "free", free, "budget", budget)
		}
	}
}

// broken, if set, is told of a broken invariant; tests set it.
var broken func(string)

// Reserved is how many frames are reserved now. While SetBudget lowers the budget the frames that go count as reserved.
func (p *Pool) Reserved() int64 { return max(0, p.budget.Load()-p.free.Load()) }

// Budget is the number of bytes that all files together may occupy.
func (p *Pool) Budget() int64 { return p.budget.Load() * PageSize }

// SetBudget changes the budget, in bytes, at least one page, rounded down to whole pages. It does not go below what is reserved or, as the
// kernel counts, in use: that is EBUSY and changes nothing; page out first.
func (p *Pool) SetBudget(bytes int64) error {
	want := bytes / PageSize
	if want < 1 || want > math.MaxInt64/PageSize {
		return fmt.Errorf("set budget to %d bytes: %w (at least %d)", bytes, unix.EINVAL, PageSize)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("set budget: %w", os.ErrClosed)
	}
	have := p.budget.Load()
	// A budget that shrinks first takes its frames, like anybody; one that grows gives them out last. So the kernel's limit is never below what
	// may be reserved, and there is no moment at which Reserve could exceed either.
	if want < have && !p.Reserve(int(have-want)) {
		return fmt.Errorf("set budget to %d bytes: %d are reserved: %w (page out first)", bytes, p.Reserved()*PageSize, unix.EBUSY)
	}
	if p.mount != nil && want != have {
		if err := p.mount.setSize(want * PageSize); err != nil {
			if want < have {
				p.free.Add(have - want)
			}
			return fmt.Errorf("set budget to %d bytes: %w", bytes, err)
		}
	}
	p.budget.Store(want)
	if want > have {
		p.free.Add(want - have)
	}
	return nil
}
