package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"machpager/internal/daemon"
	"machpager/pager/emm"
	"machpager/region"
)

func init() { tasks["churner"] = using(churner) }

var pointFlag = flag.String("failpoint", "", "the only failpoint of TestKilledAtFailpoints; \"\": all, or in CI some")

// hangLimit is how long the tasks may stand still when the pager was disturbed.
const hangLimit = 5 * time.Second

// churner makes, uses and gives up all that a task can have, until it is told to stop: what is made and ended while the pager is killed. It tells how often.
func churner(ctx context.Context, c *conn, p *region.Pager, arg churnerArg) error {
	if err := c.send(true); err != nil {
		return err
	}
	told := c.untilTold()
	n := uint64(0)
	for ; told.Err() == nil; n++ {
		if err := churn(ctx, p, &arg, n); err != nil {
			return fmt.Errorf("round %d: %w", n, err)
		}
	}
	return c.send(n)
}

type churnerArg struct {
	At
	Budget int64
	Dir    string // for paging files; "": none
}

func churn(ctx context.Context, p *region.Pager, arg *churnerArg, n uint64) error {
	const size, page = 7*4096 + 5, 4096
	o, err := p.ObjectCreate(ctx, size, nil)
	if err != nil {
		return err
	}
	defer o.Close()
	r, err := o.Map(ctx, nil)
	if err != nil {
		return err
	}
	defer r.Close()
	old, now := make([]byte, size), make([]byte, size)
	fill(old, 0, 2*n)
	fill(now, 0, 2*n+1)
	is := func(what string, got, want []byte) error {
		if i := firstDiff(got, want); i >= 0 {
			return fmt.Errorf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
		}
		return nil
	}
	copy(r.Bytes(), old)
	snap, err := o.Snapshot(ctx)
	if err != nil {
		return err
	}
	defer snap.Close()
	copy(r.Bytes(), now)
	err = r.Wire(ctx, 0, page)
	wired := err == nil
	if errors.Is(err, emm.ResourceShortage) { // others have wired what may be
		err = nil
	}
	if err := firstOf(err, r.PageOut(ctx, 0, size), is("written", r.Bytes(), now), r.Sync(ctx, 0, size)); err != nil {
		return err
	}
	if wired {
		if err := r.Unwire(ctx, 0, page); err != nil {
			return err
		}
	}
	was, err := readObject(ctx, snap, 0, size)
	if err := firstOf(err, is("snapshot", was, old)); err != nil {
		return err
	}
	if err := firstOf(r.Discard(ctx, page, 2*page), o.SetSize(ctx, 4*page), o.SetSize(ctx, size)); err != nil {
		return err
	}
	clear(now[page : 3*page])
	clear(now[4*page:])
	if err := is("discarded", r.Bytes(), now); err != nil {
		return err
	}
	if n%4 == 0 { // to what it is: all the same steps
		if err := p.SetResident(ctx, arg.Budget); err != nil {
			return err
		}
	}
	if n%8 == 0 && arg.Dir != "" {
		id, err := p.BackingStoreCreate(ctx, arg.Dir, &region.BackingStoreOptions{Capacity: 1 << 20})
		if err != nil {
			return fmt.Errorf("add a paging file: %w", err)
		}
		if err := p.BackingStoreDelete(ctx, id); err != nil && !errors.Is(err, emm.NoSpace) {
			return fmt.Errorf("remove a paging file: %w", err)
		}
	}
	return firstOf(snap.Close(), r.Close(), o.Close())
}

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
	standbyOf(t, guard.cmd.Process.Pid)
	before := holdingsOf(guard.cmd.Process.Pid)
	over := watchBudget(t, socket, o.Resident)
	ch := startFor(t, "churner", d+patience, nil)
	arg := churnerArg{At: At{socket}, Budget: o.Resident}
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
	if out := guard.output(); strings.Contains(out, "BUG") || strings.Contains(out, "level=ERROR") {
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

// smallShape is of the metamorphic test, small: most of what happens is page-out.
func smallShape(rng *rand.Rand, store string) shape {
	s := randomShapes(rng)[0]
	s.store, s.tasks, s.budget = store, 4, 8+rng.IntN(8)
	s.pages = min(s.pages, 10+rng.IntN(60))
	if s.pageSize == 2<<20 {
		s.pages = 9 + rng.IntN(3)
	}
	s.budget = max(s.budget, 16<<10/s.pageSize)
	return s
}

// TestKilled disturbs the pager at random instants while four processes run the metamorphic test under a small budget, and a fifth makes and ends objects: never a
// wrong byte, never zeros in place of data, nobody stands still for 5 s, nothing is left over, and never more is resident than may be.
func TestKilled(t *testing.T) {
	seed := randomSeed(t)
	kills, stops := 0, 0
	until := time.Now().Add(soak(0))
	for i := uint64(0); i == 0 || time.Now().Before(until); i++ {
		rng := rand.New(rand.NewPCG(seed, i))
		stores := rng.Perm(len(daemon.Stores))
		for n, how := range []string{"kill", "stop", "out of memory", "kill"} {
			s := smallShape(rng, daemon.Stores[stores[n]])
			t.Run(fmt.Sprintf("%s,%v", how, s), func(t *testing.T) {
				turns := rand.New(rand.NewPCG(seed, i<<8+uint64(n)))
				v := runRestless(t, rng, s, s.options(), max(2*time.Second, soak(0)/16), func(v *restless) {
					v.disturb(turns, disturbances[how])
				})
				if kills, stops = kills+v.kills, stops+v.stops; v.kills+v.stops == 0 {
					t.Error("nothing happened to the pager")
				}
			})
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d kills and %d stops survived in all", kills, stops)
}

// failpoints reads the names of all failpoints out of the source.
func failpoints(t *testing.T) (names []string) {
	t.Helper()
	here := regexp.MustCompile(`failpoint\.Here\("([^"]+)"\)`)
	err := filepath.WalkDir("../..", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range here.FindAllSubmatch(b, -1) {
			names = append(names, string(m[1]))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// storeOf is the store that has a failpoint; "": any.
func storeOf(point string) string {
	switch room, _, _ := strings.Cut(point, "."); room {
	case "file", "files":
		return daemon.StoreFile
	case "memory":
		return daemon.StoreMemory
	case "compressed":
		return daemon.StoreCompressed
	case "indirect":
		return daemon.StoreTiered
	}
	return ""
}

// TestKilledAtFailpoints kills the pager at each named failpoint in turn, one pager after the other on the same state.
func TestKilledAtFailpoints(t *testing.T) {
	seed := randomSeed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	names := failpoints(t)
	if len(names) < 20 {
		t.Fatalf("only %d failpoints: %q", len(names), names)
	}
	rng.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	if *pointFlag != "" {
		names = strings.Split(*pointFlag, ",")
	} else if soak(0) == 0 {
		names = names[:10]
	}
	byStore := map[string][]string{}
	for i, name := range names {
		s := storeOf(name)
		if s == "" {
			s = daemon.Stores[i%len(daemon.Stores)]
		}
		byStore[s] = append(byStore[s], name)
	}
	kills := 0
	var unmet []string
	for _, store := range daemon.Stores {
		points := byStore[store]
		if len(points) == 0 {
			continue
		}
		s := smallShape(rng, store)
		t.Run(s.String(), func(t *testing.T) {
			o := s.options()
			// Each pager dies at the point that is next in turn. In adoption each is met only once or so.
			var lives []string
			for _, name := range points {
				n := 1 + rng.IntN(20)
				if strings.Contains(name, "adopt.") {
					n = 1
				}
				lives = append(lives, fmt.Sprintf("%s=%d", name, n))
			}
			o.Failpoints = ";" + strings.Join(lives, ";") + ";"
			v := runRestless(t, rng, s, o, time.Duration(len(points)+5)*hangLimit, func(v *restless) {
				if pid := v.await(0, hangLimit); v.goOn(time.Now()) {
					v.kill(pid)
					unmet = append(unmet, v.walk(pid, points)...)
				}
			})
			kills += v.kills
		})
	}
	if kills == 0 {
		t.Error("no pager was killed")
	}
	t.Logf("%d kills survived; %d of %d failpoints were not met: %q", kills, len(unmet), len(names), unmet)
}

// walk waits for each pager after dead to die at its failpoint. One that does not come by there is killed. It returns the points that were not met.
func (v *restless) walk(dead int, points []string) (unmet []string) {
	for _, point := range points {
		pid := v.await(dead, hangLimit)
		if pid == 0 {
			v.t.Errorf("no pager follows the one that was killed; the next was to die at %s", point)
			return unmet
		}
		began, base := time.Now(), v.rounds.Load()
		for alive(pid) && time.Since(began) < time.Second {
			select {
			case <-v.stop:
				return unmet
			case <-time.After(time.Millisecond):
			}
		}
		if !alive(pid) {
			v.kills++
		} else {
			unmet = append(unmet, point)
			if v.rounds.Load() == base && !v.goOn(began) {
				return unmet
			}
			v.kill(pid)
		}
		dead = pid
	}
	v.goOn(time.Now())
	return unmet
}
