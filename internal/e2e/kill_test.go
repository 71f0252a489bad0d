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
	"testing"
	"time"

	"machpager/internal/daemon"
	"machpager/pager/emm"
	"machpager/region"
)

func init() { tasks["churner"] = using(churner) }

var pointFlag = flag.String("failpoint", "", "the only failpoint of TestKilledAtFailpoints; \"\": all, or in CI some")

// churner makes, uses and gives up all that a task can have, until it is told to stop: what is made and ended while the pager is killed. It tells how often.
func churner(ctx context.Context, c *conn, p *region.Pager, arg churnerArg) error {
	if err := c.send(true); err != nil {
		return err
	}
	told := c.untilTold()
	n := uint64(0)
	for ; told.Err() == nil; n++ {
		err := region.Guard(func() error { return churn(ctx, p, &arg, n) })
		if arg.Failing && (ofStore(err) || errors.Is(err, os.ErrClosed)) {
			continue // it has closed all it had, on the way from a fault the memory that this was in
		}
		if err != nil {
			return fmt.Errorf("round %d: %w", n, err)
		}
	}
	return c.send(n)
}

type churnerArg struct {
	At
	Budget  int64
	Dir     string // for paging files; "": none
	Failing bool   // the store fails now and then
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
	if n%2 == 0 && !arg.Failing {
		if err := churnFile(ctx, p, []string{"file", "checked"}[n/2%2], n); err != nil {
			return err
		}
	}
	return firstOf(snap.Close(), r.Close(), o.Close())
}

// churnFile makes an object over a new file, writes it, has it made durable, and reads it by another.
func churnFile(ctx context.Context, p *region.Pager, manager string, n uint64) error {
	const size = 5 * 4096
	f, err := os.CreateTemp("", "e2e-churn")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := firstOf(os.Remove(f.Name()), f.Truncate(size)); err != nil {
		return err
	}
	o := &region.ObjectOptions{Manager: manager, File: f}
	length := int64(0) // of the file
	if manager == "checked" {
		length = size
		if err := f.Truncate(0); err != nil {
			return err
		}
	}
	one, r, err := create(ctx, p, length, o, nil)
	if err != nil {
		return fmt.Errorf("%s object: %w", manager, err)
	}
	defer one.Close()
	defer r.Close()
	fill(r.Bytes(), 0, n)
	if err := firstOf(r.Sync(ctx, 0, size), r.PageOut(ctx, 0, size), check(r.Bytes(), 0, n), r.Close(), one.Close()); err != nil {
		return fmt.Errorf("%s object: %w", manager, err)
	}
	if manager == "checked" {
		return nil // one object at a time, until that has ended
	}
	got := make([]byte, size)
	if _, err := f.ReadAt(got, 0); err != nil {
		return err
	}
	return check(got, 0, n)
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
		names = names[:20]
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
				n := 1 + rng.IntN(4)
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
