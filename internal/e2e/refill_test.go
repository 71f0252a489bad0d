package e2e

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"machpager/internal/daemon"
	"machpager/region"
	"machpager/region/spawn"
)

func init() { tasks["refill"] = told(refillTask) }

type refillArg struct {
	Store, Dir string
	Duration   time.Duration
}

type refillResult struct {
	Rounds        int
	First, Last   holdings // of the pager's process, after a few rounds and at the end
	FirstR, LastR int64    // bytes of its memory (VmRSS)
}

// refillTask fills three objects and empties them, each in another way, and sees each time that nothing is left of them.
func refillTask(c *conn, arg refillArg) error {
	ctx := context.Background()
	p, err := startPager(ctx, spawn.Options{Resident: 1 << 20, Capacity: 16 << 20, Store: arg.Store, Dir: arg.Dir})
	if err != nil {
		return err
	}
	defer p.Close()
	info, err := p.Info(ctx)
	if err != nil {
		return err
	}
	var res refillResult
	const warm = 5
	for end := time.Now().Add(arg.Duration); res.Rounds <= warm || time.Now().Before(end); res.Rounds++ {
		if err := refill(ctx, p, uint64(res.Rounds+1)); err != nil {
			return fmt.Errorf("round %d: %w", res.Rounds, err)
		}
		if res.Rounds == warm {
			res.First, res.FirstR = holdingsOf(info.PagerPID), rssOf(info.PagerPID)
		}
	}
	res.Last, res.LastR = holdingsOf(info.PagerPID), rssOf(info.PagerPID)
	return firstOf(c.send(res), p.Close())
}

// rssOf is how much memory a process has, in bytes; 0 if that cannot be told.
func rssOf(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	var size, rss int64
	if err == nil {
		fmt.Sscan(string(b), &size, &rss)
	}
	return rss * int64(os.Getpagesize())
}

func refill(ctx context.Context, p *region.Pager, round uint64) error {
	const size = 2 << 20
	o, err := p.ObjectCreate(ctx, size, nil)
	if err != nil {
		return err
	}
	defer o.Close()
	var books [3]*book
	for i := range books {
		var r *region.Region
		if i == 0 {
			r, err = o.Map(ctx, nil)
		} else {
			r, err = p.Allocate(ctx, size, nil)
		}
		if err != nil {
			return err
		}
		defer r.Close()
		books[i] = newBook(r)
		for k := range books[i].versions {
			if err := books[i].put(k, round+uint64(i)<<20); err != nil {
				return err
			}
		}
	}
	full, err := p.Info(ctx)
	if err != nil {
		return err
	}
	// What was written is in frames or in paging space, and what is clean in both.
	if used := full.PagingTotal - full.PagingFree; full.Resident > full.Budget || full.KernelResident > full.Budget || full.Resident+used < 3*size {
		return fmt.Errorf("full of %d bytes, but %d are resident and %d in paging space", 3*size, full.Resident, used)
	}
	for _, b := range books {
		if err := b.checkAll(); err != nil {
			return err
		}
	}
	if err := firstOf(o.SetSize(ctx, 4096), books[0].r.Close(), o.Close(), books[1].r.Discard(ctx, 0, size), books[1].r.Close(), books[2].r.Close()); err != nil {
		return err
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		i, err := p.Info(ctx)
		if err != nil {
			return err
		}
		if i.Resident == 0 && i.KernelResident <= 0 && i.Objects == 0 && i.Mappings == 0 && i.PagingFree == i.PagingTotal {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("left when all was given up: %+v", i)
		}
	}
}

// TestFillEmptyFill: whatever is filled and emptied, in whatever way, leaves nothing behind.
func TestFillEmptyFill(t *testing.T) {
	for _, kind := range daemon.Stores {
		t.Run(kind, func(t *testing.T) {
			d := soak(2 * time.Second)
			k := startFor(t, "refill", patience+d, nil)
			k.send(refillArg{kind, t.TempDir(), d})
			var r refillResult
			k.recv(&r)
			k.wait()
			t.Logf("%d rounds; the pager holds %+v and %d KiB, before %+v and %d KiB", r.Rounds, r.Last, r.LastR>>10, r.First, r.FirstR>>10)
			if r.Last.FDs > r.First.FDs+2 || r.Last.Maps > r.First.Maps+50 || r.Last.Threads > r.First.Threads+10 {
				t.Errorf("the pager holds %+v after %d rounds, %+v after a few", r.Last, r.Rounds, r.First)
			}
			if grown := r.LastR - r.FirstR; grown > 32<<20 {
				t.Errorf("the pager has grown by %d bytes in %d rounds", grown, r.Rounds)
			}
		})
	}
}
