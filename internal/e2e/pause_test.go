package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/region"
)

func init() { tasks["pauses"] = using(pauses) }

type pausesArg struct {
	At
	Size int64 // resident
}

// wait is one access that took long, in ns of CLOCK_MONOTONIC, which is the same in all processes.
type wait struct{ From, To int64 }

func monotonic() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// pauses has memory that is resident, faults on other pages as fast as it can, and tells which accesses took a millisecond and more.
func pauses(ctx context.Context, c *conn, p *region.Pager, arg pausesArg) error {
	r, err := p.Allocate(ctx, arg.Size, nil)
	if err != nil {
		return err
	}
	if err := firstOf(r.Populate(ctx, 0, arg.Size, true), c.send(true)); err != nil {
		return err
	}
	for {
		var d time.Duration
		if err := c.recv(&d); err != nil {
			return err
		}
		if d == 0 {
			return r.Close()
		}
		const size = 1 << 30
		extra, err := p.Allocate(ctx, size, nil)
		if err != nil {
			return err
		}
		var long []wait
		began, from := time.Now(), monotonic()
		for at, last := time.Duration(0), time.Duration(0); at < d; last = at {
			extra.Bytes()[rand.Int64N(size>>12)<<12] = 1
			if at = time.Since(began); at-last >= time.Millisecond {
				long = append(long, wait{from + int64(last), from + int64(at)})
			}
		}
		if err := firstOf(extra.Close(), c.send(long)); err != nil {
			return err
		}
	}
}

// longest is the longest of the waits that have begun before an instant and end after another one.
func longest(all []wait, before, after int64) (d time.Duration) {
	for _, w := range all {
		if w.From < before && w.To > after {
			d = max(d, time.Duration(w.To-w.From))
		}
	}
	return d
}

// quantiles are for people.
type quantiles []time.Duration

func (q quantiles) at(share float64) time.Duration { return q[int(share*float64(len(q)-1))] }

func (q quantiles) String() string {
	slices.Sort(q)
	return fmt.Sprintf("p50 %v, p90 %v, p99 %v, most %v", q.at(0.5).Round(time.Microsecond), q.at(0.9).Round(time.Microsecond), q.at(0.99).Round(time.Microsecond), q.at(1).Round(time.Microsecond))
}

// pauseOver kills a pager that has 1 GiB resident, again and again, while four tasks do nothing but fault. It returns the longest wait of each task over each death, and in the same time
// before it: what of it is the machine's.
func pauseOver(t *testing.T, deaths int, o pagerOptions) (over, idle quantiles) {
	t.Helper()
	const tasks, size, span = 4, 256 << 20, 200 * time.Millisecond
	o.Served, o.Resident, o.Store, o.Restarts, o.Settled = true, 2<<30, "memory", restarts, 1
	socket, guard := pagerAt(t, o)
	ks := make([]*task, tasks)
	for i := range ks {
		ks[i] = startFor(t, "pauses", patience+time.Duration(deaths)*2*time.Second, nil)
		ks[i].send(pausesArg{At{socket}, size})
		ks[i].ready()
	}
	p := dial(t, socket)
	defer p.Close()
	info := infoOf(t, p)
	if info.Resident < tasks*size {
		t.Fatalf("%d bytes resident, want %d", info.Resident, tasks*size)
	}
	for range deaths {
		heir := 0
		if !o.NoStandby {
			heir = standbyOf(t, guard.cmd.Process.Pid)
		}
		for _, k := range ks {
			k.send(2*span + span/2)
		}
		time.Sleep(span + time.Duration(rand.Int64N(int64(span/4))))
		killed := monotonic()
		pid, err := killPager(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if heir != 0 && pid != heir {
			t.Errorf("pager %d follows, and %d stood by", pid, heir)
		}
		for _, k := range ks {
			var all []wait
			k.recv(&all)
			over = append(over, longest(all, killed+int64(span), killed))
			idle = append(idle, longest(all, killed, killed-int64(span)))
		}
	}
	for _, k := range ks {
		k.send(time.Duration(0))
		k.wait()
	}
	t.Logf("the longest wait of each of %d tasks over %d deaths, %d MiB resident: %v", tasks, deaths, info.Resident>>20, over)
	t.Logf("in the same time before each death: %v", idle)
	return over, idle
}

// TestPause measures how long threads in faults wait for the next pager. The goal is 100 ms at the 99th percentile; on a machine that makes them wait without any death, four times
// of what it does then.
func TestPause(t *testing.T) {
	deaths := 20
	if d := soak(0); d > 0 {
		deaths = max(deaths, int(d/time.Second))
		t.Run("no standby", func(t *testing.T) { pauseOver(t, deaths, pagerOptions{NoStandby: true}) })
	}
	over, idle := pauseOver(t, deaths, pagerOptions{})
	if limit := max(100*time.Millisecond, 4*idle.at(1)); over.at(0.99) > limit {
		t.Errorf("the 99th percentile is %v, want at most %v", over.at(0.99), limit)
	}
}
