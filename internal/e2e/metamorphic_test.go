package e2e

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"machpager/internal/daemon"
	"machpager/internal/policy"
	"machpager/pager/emm"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the randomised tests; 0: a new one")

// randomSeed tells how to have the same again.
func randomSeed(t *testing.T) uint64 {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("rerun with: go test ./internal/e2e -run '^%s$' -seed %d", t.Name(), seed)
	return seed
}

// shape is one configuration of the metamorphic test.
type shape struct {
	store    string
	policy   string
	tasks    int
	pageSize int
	pages    int  // of the object
	budget   int  // pages
	failing  bool // the store fails now and then
}

func (s shape) String() string {
	return fmt.Sprintf("%s,%s,tasks=%d,pagesize=%d,pages=%d,budget=%d", s.store, s.policy, s.tasks, s.pageSize, s.pages, s.budget)
}

func (s shape) options() pagerOptions {
	o := pagerOptions{Resident: int64(s.budget) * int64(s.pageSize), Store: s.store, Policy: s.policy}
	if s.store == daemon.StoreTiered {
		o.Compressed = 1 << 20 // so that both tiers are used
	}
	return o
}

// randomShapes has every value of every dimension at least once (every number of tasks from 1 to 8, every store and policy and page size), in combinations
// that are different each time.
func randomShapes(rng *rand.Rand) []shape {
	shapes := make([]shape, 8)
	deal := func(values int, set func(s *shape, value int)) {
		for i, p := range rng.Perm(len(shapes)) {
			set(&shapes[i], p%values)
		}
	}
	sizes := [...]struct{ pageSize, least, most int }{{4096, 9, 2000}, {64 << 10, 9, 80}, {2 << 20, 3, 12}}
	deal(len(daemon.Stores), func(s *shape, v int) { s.store = daemon.Stores[v] })
	deal(len(policy.Names()), func(s *shape, v int) { s.policy = policy.Names()[v] })
	deal(len(shapes), func(s *shape, v int) { s.tasks = v + 1 })
	deal(len(sizes), func(s *shape, v int) {
		s.pageSize = sizes[v].pageSize
		s.pages = sizes[v].least + rng.IntN(sizes[v].most-sizes[v].least)
	})
	deal(4, func(s *shape, v int) {
		// The smallest budget, one little above, half of what there is, all of it.
		s.budget = max(8, []int{8, 9 + rng.IntN(8), s.pages / 2, s.pages + 1}[v])
	})
	return shapes
}

// TestMetamorphic runs random lists of operations in several processes on one object, one operation in each at the same time, and compares
// every byte read with a model in ordinary memory. Operations of one round never write the same byte, nor read one that another
// writes; but they share pages, and page-outs go where they like. Never a wrong byte, and never more resident than may be, as the kernel counts.
func TestMetamorphic(t *testing.T) {
	seed := randomSeed(t)
	const turn = 8
	each := 12 * time.Second / turn
	until := time.Now().Add(soak(0))
	for i := uint64(0); i == 0 || time.Now().Before(until); i++ {
		rng := rand.New(rand.NewPCG(seed, i))
		for _, s := range randomShapes(rng) {
			t.Run(s.String(), func(t *testing.T) {
				o := s.options()
				socket, _ := pagerAt(t, o)
				over := watchBudget(t, socket, o.Resident)
				mirrors(t, rng, socket, s, each, nil)
				over()
			})
		}
		if t.Failed() {
			return
		}
	}
}

// TestShapes: the metamorphic test leaves nothing out, whatever its seed.
func TestShapes(t *testing.T) {
	for seed := range uint64(100) {
		seen := map[string]bool{}
		for _, s := range randomShapes(rand.New(rand.NewPCG(seed, 0))) {
			for _, v := range []any{s.store, s.policy, s.tasks, -s.pageSize} {
				seen[fmt.Sprint(v)] = true
			}
			seen[fmt.Sprint("least ", s.budget == 8)], seen[fmt.Sprint("less ", s.budget < s.pages)] = true, true
		}
		want := append(slices.Clone(daemon.Stores), policy.Names()...)
		want = append(want, "1", "2", "3", "4", "5", "6", "7", "8", "-4096", "-65536", "-2097152", "least true", "less true", "less false")
		for _, w := range want {
			if !seen[w] {
				t.Errorf("seed %d: no %s in %v", seed, w, seen)
			}
		}
	}
}

// watchBudget looks, as often as it can, at what the kernel says is resident, until the returned function is called.
func watchBudget(t *testing.T, socket string, budget int64) func() {
	p := dial(t, socket)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	looks, most := 0, int64(0)
	go func() {
		defer close(done)
		for ; ctx.Err() == nil; looks++ {
			if i, err := p.Info(ctx); err == nil {
				most = max(most, i.KernelResident)
			}
			time.Sleep(time.Millisecond)
		}
	}()
	return func() {
		cancel()
		<-done
		p.Close()
		t.Logf("at most %d bytes resident in %d looks, budget %d", most, looks, budget)
		if most > budget || most == 0 {
			t.Errorf("%d bytes resident, budget %d", most, budget)
		}
	}
}

// mirrors runs the tasks of one configuration for d, or until more, which is called after each round unless it is nil, says no.
func mirrors(t *testing.T, rng *rand.Rand, socket string, s shape, d time.Duration, more func() bool) {
	n, pageSize := s.tasks, s.pageSize
	size := int64(s.pages*pageSize - rng.IntN(pageSize)) // the last page may be partial
	model := make([]byte, size)
	ks := make([]*task, n)
	var port emm.Port
	for i := range ks {
		ks[i] = startFor(t, "mirror", d+patience, func(c *exec.Cmd) { c.Env = append(os.Environ(), "GOMAXPROCS=2") })
		ks[i].send(mirrorArg{At{socket}, port, size, pageSize, s.failing})
		ks[i].recv(&port)
	}
	var history []string
	rounds, again := 0, 0
	for end := time.Now().Add(d); time.Now().Before(end); rounds++ {
		ops := randomOps(rng, n, size, int64(pageSize), uint64(rounds+1))
		history = append(history, fmt.Sprint(rounds, ops))
		// A failed send or receive ends the test, which only its own goroutine may do: collect errors instead.
		results, errs := make([]opResult, n), make([]error, n)
		var wg sync.WaitGroup
		for i, k := range ks {
			wg.Go(func() { errs[i] = firstOf(k.c.send(ops[i]), k.c.recv(&results[i])) })
		}
		wg.Wait()
		for i, o := range ops {
			switch o.Kind {
			case opWrite, opWriteAt:
				fill(model[o.Off:o.Off+o.N], o.Off, o.Contents)
			case opDiscard:
				a, b := discarded(o, int64(pageSize), size)
				clear(model[a:max(a, b)])
			case opSetSize:
				clear(model[min(roundUp(o.Off, int64(pageSize)), size):])
			}
			if errs[i] != nil {
				ks[i].fail(fmt.Errorf("round %d: %v: %w", rounds, o, errs[i]))
			}
		}
		for i, o := range ops {
			res := results[i]
			again += res.Again
			wrong := ""
			if res.Err != "" {
				wrong = res.Err
			} else if res.Data != nil {
				if at := firstDiff(res.Data, model[o.Off:o.Off+o.N]); at >= 0 {
					at := int64(at)
					wrong = fmt.Sprintf("byte %#x (page %d) is %#x, want %#x", o.Off+at, (o.Off+at)/int64(pageSize), res.Data[at], model[o.Off+at])
				}
			}
			if wrong != "" {
				for _, h := range history[max(0, len(history)-8):] {
					t.Log(h)
				}
				t.Fatalf("round %d, task %d: %v: %s", rounds, i, o, wrong)
			}
		}
		if more != nil && !more() {
			break
		}
	}
	for _, k := range ks {
		k.send(op{Kind: opEnd})
		k.wait()
	}
	t.Logf("%d rounds of %d operations, done again %d times as the store failed", rounds, n, again)
}

// discarded is the whole pages inside a range. The last page of an object may be partial, and then no range has it whole.
func discarded(o op, pageSize, size int64) (a, b int64) {
	return min(roundUp(o.Off, pageSize), size), (o.Off + o.N) / pageSize * pageSize
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// randomOps makes one operation for each of n tasks, such that their outcome does not depend on their order.
func randomOps(rng *rand.Rand, n int, size, pageSize int64, version uint64) []op {
	ops := make([]op, n)
	type span struct {
		off, end int64
		write    bool
	}
	var taken []span
	mapped, shrinks := false, false // by one of them
	free := func(off, n int64, write bool) bool {
		for _, s := range taken {
			if off < s.end && s.off < off+n && (write || s.write) {
				return false
			}
		}
		taken = append(taken, span{off, off + n, write})
		return true
	}
	for i := range ops {
		for {
			o := op{Kind: opKind(rng.IntN(int(opEnd))), Contents: version*16 + uint64(i)}
			o.Off = rng.Int64N(size)
			most := size - o.Off
			switch rng.IntN(3) { // often less than a page, so that operations share pages
			case 0:
				most = min(most, 64)
			case 1:
				most = min(most, 4*pageSize)
			}
			o.N = 1 + rng.Int64N(most)
			if rng.IntN(16) == 0 {
				o.Off, o.N = 0, size
			}
			if o.Kind == opRemap && rng.IntN(8) != 0 {
				continue
			}
			if maps := o.Kind == opRemap || o.Kind == opReadOnly || o.Kind == opSnapshot; maps && shrinks || o.Kind == opSetSize && mapped {
				continue // what lies beyond the end of the object cannot be mapped
			} else if maps {
				mapped = true
			}
			switch o.Kind {
			case opWire, opSnapshot, opSetSize:
				if rng.IntN(4) != 0 {
					continue
				}
			}
			switch o.Kind {
			case opRead, opReadAt, opSnapshot, opReadOnly:
				if !free(o.Off, o.N, false) {
					continue
				}
			case opWire: // what is wired cannot be discarded
				a := o.Off / pageSize * pageSize
				if !free(a, roundUp(o.Off+o.N, pageSize)-a, false) {
					continue
				}
			case opSetSize:
				if a := roundUp(o.Off, pageSize); a < size && !free(a, size-a, true) {
					continue
				}
				o.N, shrinks = 0, true
			case opWrite, opWriteAt, opDiscard:
				if !free(o.Off, o.N, true) {
					continue
				}
			}
			ops[i] = o
			break
		}
	}
	for i := range ops {
		ops[i].Shrunk = shrinks
	}
	return ops
}
