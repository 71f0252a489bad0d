package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"machpager/region"
)

func init() {
	tasks["greedy"] = using(greedyTask)
	tasks["interactive"] = using(interactiveTask)
}

// greedyTask writes to far more memory than there is, as fast as it can, until it is told to stop.
func greedyTask(ctx context.Context, c *conn, p *region.Pager, _ At) error {
	r, err := p.Allocate(ctx, 512<<20, nil)
	if err != nil {
		return err
	}
	told := c.untilTold()
	if err := c.send(true); err != nil {
		return err
	}
	b, n := r.Bytes(), 0
	for ; ; n++ {
		if n%64 == 0 {
			select {
			case <-told.Done():
				return c.send(n)
			default:
			}
		}
		b[n*4096%len(b)]++
	}
}

type interactiveArg struct {
	At
	Ops int
}

type interactiveResult struct {
	Times  []time.Duration // of each operation
	Pager  time.Duration   // p99 of what the pager took for a fault, from reading the message to waking the thread
	Stored int64           // pages that were paged out under it, and came back
}

const interactivePages = 512 // 2 MiB

// interactiveTask does a little every 2 ms: it looks at some pages of its working set, and writes to one that is new.
func interactiveTask(ctx context.Context, c *conn, p *region.Pager, arg interactiveArg) error {
	set, err := p.Allocate(ctx, interactivePages*4096, nil)
	if err != nil {
		return err
	}
	fresh, err := p.Allocate(ctx, int64(arg.Ops)*4096, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{ClusterSize: 4096}})
	if err != nil {
		return err
	}
	for i := range interactivePages {
		set.Bytes()[i*4096] = 1
	}
	order := rand.Perm(arg.Ops) // no stream that the pager could read ahead: each is a fault
	var res interactiveResult
	before := set.Stats().Stored
	for i := range arg.Ops {
		time.Sleep(2 * time.Millisecond)
		start := time.Now()
		for range 8 {
			set.Bytes()[rand.IntN(interactivePages)*4096]++
		}
		fresh.Bytes()[order[i]*4096] = 1
		res.Times = append(res.Times, time.Since(start))
	}
	res.Stored = int64(set.Stats().Stored - before)
	res.Pager = fresh.Stats().Latency.P99
	return c.send(res)
}

// percentile sorts.
func percentile(d []time.Duration, p float64) time.Duration {
	slices.Sort(d)
	return d[min(len(d)-1, int(p*float64(len(d))))]
}

// TestFair has one task take all that it can while another does a little now and then. The second keeps its memory, and its time.
func TestFair(t *testing.T) {
	socket, _ := pagerAt(t, pagerOptions{Resident: 32 << 20})
	interact := func() interactiveResult {
		var res interactiveResult
		run(t, "interactive", interactiveArg{At{socket}, 700}, &res, nil)
		return res
	}
	alone := interact()
	g := start(t, "greedy", nil)
	g.send(At{socket})
	g.ready()
	time.Sleep(300 * time.Millisecond) // all memory is taken
	beside := interact()
	again := func() interactiveResult {
		g.send(true)
		var n int
		g.recv(&n)
		g.wait()
		t.Logf("the greedy one wrote to %d pages", n)
		return interact()
	}()
	show := func(what string, r interactiveResult) string {
		return fmt.Sprintf("%s: p50 %v, p90 %v, p99 %v, max %v; the pager's part p99 %v; %d pages came back", what, percentile(r.Times, 0.5), percentile(r.Times, 0.9), percentile(r.Times, 0.99),
			percentile(r.Times, 1), r.Pager, r.Stored)
	}
	t.Log(show("alone", alone))
	t.Log(show("beside a greedy one", beside))
	t.Log(show("alone again", again))
	if beside.Stored > interactivePages/8 {
		t.Errorf("%d of its %d pages were paged out while it used them", beside.Stored, interactivePages)
	}
	// Half the operations tell: the slowest wait for a processor, which no pager deals out. Without shares this is 20 to 40.
	if a, b := percentile(alone.Times, 0.5), percentile(beside.Times, 0.5); b > 3*a {
		t.Errorf("half of its operations took %v and more, alone %v", b, a)
	}
}
