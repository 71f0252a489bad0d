package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"machpager/internal/daemon"
	"machpager/region"
)

// hangLimit is how long the tasks may stand still when the pager was disturbed.
const hangLimit = 5 * time.Second

// restless is a pager of spawn.Serve whose deaths are survived, seen from outside.
type restless struct {
	t      *testing.T
	guard  *task         // the guardian
	stop   chan struct{} // closed when the tasks have ended
	rounds atomic.Int64

	kills, early, starved, stops int             // early: while it took over; starved: by the kernel's killer
	pauses                       []time.Duration // from a disturbance to the first operation that ended well
}

// await waits until there is a pager, other than not, that serves or is about to.
func (v *restless) await(not int, limit time.Duration) int {
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		if all := pagersOf(v.guard.cmd.Process.Pid); len(all) > 0 && all[0] != not {
			return all[0]
		}
		if time.Now().After(end) {
			return 0
		}
	}
}

// goOn waits until all tasks have gone on since a disturbance. false: they have ended, or hang, and have said where.
func (v *restless) goOn(since time.Time) bool {
	// The round that was under way may have needed nothing of the pager.
	for base := v.rounds.Load(); v.rounds.Load() < base+2; time.Sleep(time.Millisecond) {
		select {
		case <-v.stop:
			return false
		default:
		}
		if d := time.Since(since); d > hangLimit {
			v.t.Errorf("the tasks stand still %v after the pager was disturbed", d)
			for _, pid := range descendants(os.Getpid()) {
				v.t.Logf("%s", stacks(pid))
			}
			return false
		}
	}
	v.pauses = append(v.pauses, time.Since(since))
	return true
}

func (v *restless) String() string {
	slices.Sort(v.pauses)
	at := func(q float64) time.Duration {
		if len(v.pauses) == 0 {
			return 0
		}
		return v.pauses[int(q*float64(len(v.pauses)-1))].Round(100 * time.Microsecond)
	}
	return fmt.Sprintf("%d kills survived, %d of them while it took over and %d for want of memory, and %d stops; two rounds after each: median %v, p99 %v, most %v",
		v.kills, v.early, v.starved, v.stops, at(0.5), at(0.99), at(1))
}

// disturbances by name: each is done to the pager pid at a random instant, and ends it, or does not.
var disturbances = map[string]func(v *restless, rng *rand.Rand, pid int){
	"kill": func(v *restless, _ *rand.Rand, pid int) { v.kill(pid) },
	"stop": func(v *restless, rng *rand.Rand, pid int) {
		if syscall.Kill(pid, syscall.SIGSTOP) != nil {
			return
		}
		v.stops++
		time.Sleep(time.Duration(rng.Int64N(int64(300 * time.Millisecond))))
		if rng.IntN(4) == 0 {
			v.kill(pid)
		} else {
			syscall.Kill(pid, syscall.SIGCONT)
		}
	},
	// The next page that it needs for itself is one too many.
	"out of memory": func(v *restless, rng *rand.Rand, pid int) {
		if err := starve(v.t, pid); err != nil {
			v.t.Logf("killed, as there is no memory control group here: %v", err)
		}
		for end := time.Now().Add(300 * time.Millisecond); alive(pid) && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if alive(pid) {
			v.kill(pid)
		} else {
			v.kills, v.starved = v.kills+1, v.starved+1
		}
	},
}

// starve moves a process into a memory control group of its own, which is full: the kernel's killer comes when the process needs a page.
func starve(t *testing.T, pid int) error {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	dir, limit := "", "memory.max"
	for line := range strings.Lines(string(b)) {
		switch part := strings.SplitN(strings.TrimSpace(line), ":", 3); {
		case len(part) != 3:
		case part[1] == "memory":
			dir, limit = filepath.Join("/sys/fs/cgroup/memory", part[2]), "memory.limit_in_bytes"
		case part[0] == "0" && dir == "":
			dir = filepath.Dir(filepath.Join("/sys/fs/cgroup", part[2]))
		}
	}
	dir = filepath.Join(dir, fmt.Sprintf("machpager-e2e-%d", pid))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	t.Cleanup(func() {
		for range 100 { // until the process is gone
			if os.Remove(dir) == nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("%s cannot be removed", dir)
	})
	return firstOf(os.WriteFile(filepath.Join(dir, limit), []byte("65536"), 0), os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, pid), 0))
}

func (v *restless) kill(pid int) {
	if syscall.Kill(pid, syscall.SIGKILL) == nil {
		v.kills++
	}
}

// disturb does it at random instants until the tasks have ended.
func (v *restless) disturb(rng *rand.Rand, how func(v *restless, rng *rand.Rand, pid int)) {
	v.goOn(time.Now())
	for !v.t.Failed() {
		select {
		case <-v.stop:
			return
		case <-time.After(time.Duration(rng.ExpFloat64() * float64(30*time.Millisecond))):
		}
		pid := v.await(0, hangLimit)
		began := time.Now()
		how(v, rng, pid)
		for rng.IntN(3) == 0 && !alive(pid) { // and the next one, while it takes over
			next := v.await(pid, hangLimit)
			if next == 0 {
				v.t.Error("no pager follows the one that was killed")
				return
			}
			time.Sleep(time.Duration(rng.Int64N(int64(20 * time.Millisecond))))
			if v.early, pid = v.early+1, next; syscall.Kill(pid, syscall.SIGKILL) == nil {
				v.kills++
			}
			began = time.Now()
		}
		if !v.goOn(began) {
			return
		}
	}
}

// runRestless runs the tasks of one shape, and a churner, on a pager with these options, until with, which disturbs it, has ended, or for d. Nothing may be
// wrong, and nothing left.
func runRestless(t *testing.T, rng *rand.Rand, s shape, o pagerOptions, d time.Duration, with func(v *restless)) *restless {
	t.Helper()
	o.Served, o.Restarts, o.Settled = true, restarts, 1
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	socket, guard := pagerAt(t, o)
	v := &restless{t: t, guard: guard, stop: make(chan struct{})}
	if err := settledStandby(guard.cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	before := holdingsOf(guard.cmd.Process.Pid)
	over := watchBudget(t, socket, o.Resident)
	ch := startFor(t, "churner", d+patience, nil)
	arg := churnerArg{At: At{socket}, Budget: o.Resident, Failing: s.failing}
	if s.store == daemon.StoreFile || s.store == daemon.StoreTiered {
		arg.Dir = o.Dir
	}
	ch.send(arg)
	ch.ready()

	done := make(chan struct{})
	go func() {
		defer close(done)
		with(v)
	}()
	func() {
		defer func() { close(v.stop); <-done }()
		mirrors(t, rng, socket, s, d, func() bool {
			v.rounds.Add(1)
			select {
			case <-done:
				return false
			default:
				return true
			}
		})
	}()
	ch.send(true)
	var churned uint64
	ch.recv(&churned)
	ch.wait()
	over()
	nothingLeft(t, socket, guard, before)
	if out := guard.output(); strings.Contains(out, "BUG") || strings.Contains(out, "level=ERROR") && !s.failing {
		t.Errorf("the pagers say:\n%s", out)
	}
	guard.send(true)
	guard.wait()
	t.Logf("%v; %d objects came and went", v, churned)
	return v
}

// nothingLeft: when all tasks have gone the pager has nothing of theirs, and the guardian no more than before the first.
func nothingLeft(t *testing.T, socket string, guard *task, before holdings) {
	t.Helper()
	p := dial(t, socket)
	defer p.Close()
	var i region.Info
	var now holdings
	pid := guard.cmd.Process.Pid
	for end := time.Now().Add(hangLimit); ; time.Sleep(5 * time.Millisecond) {
		i, now = infoOf(t, p), holdingsOf(pid)
		if i.Objects == 0 && i.Mappings == 0 && i.Resident == 0 && i.KernelResident <= 0 && i.PagingFree == i.PagingTotal && i.Tasks <= 1 &&
			now.FDs <= before.FDs+4 { // the one connection there is
			return
		}
		if time.Now().After(end) {
			list, _ := p.Objects(t.Context())
			t.Fatalf("left of tasks that are gone: %+v, objects %+v; the guardian holds %+v, before %+v: %v", i, list, now, before, fdsOf(pid))
		}
	}
}
