package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"machpager/region"
)

func init() {
	tasks["greedy"] = using(greedyTask)
	tasks["hog"] = hogTask
	tasks["gridlock"] = using(gridlockTask)
	tasks["interactive"] = using(interactiveTask)
}

// whileTold does something while the test says so: each bool turns it on or off, and is answered. Nil when the test has ended.
func whileTold(c *conn, on *atomic.Bool) error {
	for {
		var turn bool
		if err := c.recv(&turn); err != nil {
			return nil
		}
		on.Store(turn)
		if err := c.send(true); err != nil {
			return err
		}
	}
}

// turn turns a task of whileTold on or off.
func (k *task) turn(on bool) {
	k.t.Helper()
	k.send(on)
	var done bool
	k.recv(&done)
}

// greedyTask writes to far more memory than there is, as fast as it can.
func greedyTask(ctx context.Context, c *conn, p *region.Pager, _ At) error {
	r, err := p.Allocate(ctx, 512<<20, nil)
	if err != nil {
		return err
	}
	var on atomic.Bool
	go func() {
		b := r.Bytes()
		for i := 0; ; i += 4096 {
			for !on.Load() {
				time.Sleep(time.Millisecond)
			}
			b[i%len(b)]++
		}
	}()
	return whileTold(c, &on)
}

// hogTask computes, on as many threads as there are processors, and has no memory of the pager's.
func hogTask(c *conn) error {
	n := runtime.NumCPU()
	runtime.GOMAXPROCS(n + 2)
	var on atomic.Bool
	for range n {
		go func() {
			for {
				if !on.Load() {
					time.Sleep(time.Millisecond)
				}
			}
		}()
	}
	return whileTold(c, &on)
}

// gridlockTask has many threads wait for a manager that never answers, more than it may have requests out, others for pages of the default pager, and asks for much on its socket. The test stops it in
// the middle of that, or not.
//
// Before it is stopped it waits by plain touches alone: a thread that is in a system call on missing memory when a signal comes stays in the kernel and asks again and again (see docs/security.md).
func gridlockTask(ctx context.Context, c *conn, p *region.Pager, arg gridlockArg) error {
	runtime.GOMAXPROCS(64)
	debug.SetGCPercent(-1) // a collection would wait for those that wait
	_, deaf, err := create(ctx, p, 16<<20, &region.ObjectOptions{Manager: "faulty", Arg: modeStuck}, nil)
	if err != nil {
		return err
	}
	r, err := p.Allocate(ctx, 8<<20, nil)
	if err != nil {
		return err
	}
	for i := range 16 {
		go func() { deaf.Bytes()[i*65536]++ }()
	}
	if !arg.Stopped {
		for i := range int64(100) {
			go deaf.ReadAt(make([]byte, 1), (100+i)*65536)
		}
	}
	for range 4 {
		go func() {
			for {
				r.Bytes()[rand.Int64N(r.Size())]++
				time.Sleep(10 * time.Millisecond)
			}
		}()
		go func() {
			for {
				p.Info(ctx)
				time.Sleep(10 * time.Millisecond)
			}
		}()
	}
	time.Sleep(50 * time.Millisecond)
	if err := c.send(true); err != nil {
		return err
	}
	var end bool
	c.recv(&end)
	return errors.New("the test should have killed it")
}

type gridlockArg struct {
	At
	Stopped bool
}

type interactiveResult struct {
	Times  []time.Duration // of each operation
	Waits  []time.Duration // of each: for a processor, of the thread itself
	Pager  time.Duration   // p99 of what the pager took for a fault, from reading the message to waking the thread
	Stored int64           // pages that were paged out under it, and came back
}

const interactivePages = 512 // 2 MiB

// interactiveTask does a little every 2 ms, as often as it is told: it looks at some pages of its working set, and writes to one that is new.
func interactiveTask(ctx context.Context, c *conn, p *region.Pager, _ At) error {
	set, err := p.Allocate(ctx, interactivePages*4096, nil)
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	delays, err := os.Open("/proc/thread-self/schedstat")
	if err != nil {
		return err
	}
	defer delays.Close()
	delay := func() time.Duration { // that this thread was runnable, and did not run
		var b [128]byte
		n, _ := delays.ReadAt(b[:], 0)
		if f := bytes.Fields(b[:n]); len(f) > 1 {
			d, _ := strconv.ParseInt(string(f[1]), 10, 64)
			return time.Duration(d)
		}
		return 0
	}
	for {
		var ops int
		if err := c.recv(&ops); err != nil {
			return nil
		}
		fresh, err := p.Allocate(ctx, int64(ops)*4096, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{ClusterSize: 4096}})
		if err != nil {
			return err
		}
		for i := range interactivePages {
			set.Bytes()[i*4096] = 1
		}
		order := rand.Perm(ops) // no stream that the pager could read ahead: each is a fault
		var res interactiveResult
		before := set.Stats().Stored
		for i := range ops {
			time.Sleep(2 * time.Millisecond)
			w := delay()
			start := time.Now()
			for range 8 {
				set.Bytes()[rand.IntN(interactivePages)*4096]++
			}
			fresh.Bytes()[order[i]*4096] = 1
			res.Times = append(res.Times, time.Since(start))
			res.Waits = append(res.Waits, delay()-w)
		}
		res.Stored = int64(set.Stats().Stored - before)
		res.Pager = fresh.Stats().Latency.P99
		if err := fresh.Close(); err != nil {
			return err
		}
		if err := c.send(res); err != nil {
			return err
		}
	}
}

// percentile sorts.
func percentile(d []time.Duration, p float64) time.Duration {
	slices.Sort(d)
	return d[min(len(d)-1, int(p*float64(len(d))))]
}

// fairOps are done at a stretch: two of them are slower than p99.
const fairOps = 250

// fairRounds are measured at least, and up to mostRounds where the machine is too noisy to tell.
const fairRounds, mostRounds = 3, 8

// fairness is what was measured, by what went on beside: a result for each round.
type fairness map[string][]interactiveResult

// p is the median over the rounds of a percentile of the operations' times.
func (f fairness) p(beside string, q float64) time.Duration {
	var all []time.Duration
	for _, r := range f[beside] {
		all = append(all, percentile(slices.Clone(r.Times), q))
	}
	return percentile(all, 0.5)
}

func (f fairness) String() string {
	var b bytes.Buffer
	for _, beside := range slices.Sorted(maps.Keys(f)) {
		var waits, pager []time.Duration
		stored := int64(0)
		for _, r := range f[beside] {
			waits, pager, stored = append(waits, percentile(slices.Clone(r.Waits), 0.99)), append(pager, r.Pager), stored+r.Stored
		}
		fmt.Fprintf(&b, "\n%-14s p50 %v, p90 %v, p99 %v; p99 of the thread's own wait for a processor %v, of the pager's part of a fault %v; %d pages came back", beside, f.p(beside, 0.5),
			f.p(beside, 0.9), f.p(beside, 0.99), percentile(waits, 0.5), percentile(pager, 0.5), stored)
	}
	return b.String()
}

// TestFair has one task take all that it can while another does a little now and then. The second keeps its memory, and its time, at the 99th percentile too: whole operations, from the first
// touch to the last, take at most three times as long as they do alone, or, where that is more, beside a program that computes and has no memory of the pager's: nobody who pages can
// have more of the processors than that leaves. So it is beside tasks that are stuck: in faults that nobody answers, or stopped in the middle of all that it does.
//
// Conditions take turns, and medians over the rounds count. Each part of it fails where what it stands for is taken away: without shares the working set is paged out, and half of the operations take
// five times as long and more; with readers that take their turns as all threads do and extents copied in one piece, p99 is a tick of the kernel's clock and more; where what waits for a
// manager is tried without a rest, the pager takes a processor from everybody.
func TestFair(t *testing.T) {
	socket, _ := pagerAt(t, pagerOptions{Resident: 32 << 20})
	it := startFor(t, "interactive", 3*time.Minute, nil)
	it.send(At{socket})
	greedy := startFor(t, "greedy", 3*time.Minute, nil)
	greedy.send(At{socket})
	hog := startFor(t, "hog", 3*time.Minute, nil)
	greedy.turn(true)
	time.Sleep(300 * time.Millisecond) // all memory is taken
	greedy.turn(false)
	stuck := func(stop bool) func() func() {
		return func() func() {
			k := start(t, "gridlock", func(c *exec.Cmd) { c.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1") }) // each signal would make all that wait fault again
			k.send(gridlockArg{At{socket}, stop})
			var ready bool
			k.recv(&ready)
			if stop {
				k.cmd.Process.Signal(syscall.SIGSTOP)
			}
			return func() {
				k.cmd.Process.Kill()
				<-k.exited
			}
		}
	}
	toggled := func(k *task) func() func() {
		return func() func() {
			k.turn(true)
			time.Sleep(50 * time.Millisecond)
			return func() { k.turn(false) }
		}
	}
	got := fairness{}
	besides := []struct {
		name  string
		begin func() (end func())
	}{{"alone", func() func() { return func() {} }}, {"computing", toggled(hog)}, {"greedy", toggled(greedy)}, {"stuck", stuck(false)}, {"stopped", stuck(true)}}
	unfair := func() (list []string) {
		// Three times 0.2 ms is less than one turn of anybody else's on a machine that tests share. What this is about, waiting for the tick of the clock, takes 4 ms and more.
		most := max(3*max(got.p("alone", 0.99), got.p("computing", 0.99)), 2*time.Millisecond)
		for _, b := range besides[2:] {
			if x := got.p(b.name, 0.99); x > most {
				list = append(list, fmt.Sprintf("beside a %s one p99 is %v, want at most %v", b.name, x, most))
			}
		}
		if x, most := got.p("greedy", 0.5), max(3*got.p("alone", 0.5), 100*time.Microsecond); x > most {
			list = append(list, fmt.Sprintf("beside a greedy one half of its operations took %v and more, want at most %v", x, most))
		}
		return list
	}
	for round := 1; round <= mostRounds; round++ {
		for _, b := range besides {
			end := b.begin()
			it.send(fairOps)
			var r interactiveResult
			it.recv(&r)
			end()
			got[b.name] = append(got[b.name], r)
		}
		if round >= fairRounds && len(unfair()) == 0 {
			break
		}
	}
	t.Log(got)
	for _, x := range unfair() {
		t.Error(x)
	}
	stored := int64(0)
	for _, r := range got["greedy"] {
		stored += r.Stored
	}
	if most := len(got["greedy"]) * interactivePages / 8; stored > int64(most) {
		t.Errorf("%d of its %d pages were paged out while it used them, over %d rounds", stored, interactivePages, len(got["greedy"]))
	}
}
