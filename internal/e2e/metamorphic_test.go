package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/region"
)

func init() { tasks["mirror"] = mirror }

var seedFlag = flag.Uint64("seed", 0, "seed of the metamorphic test; 0: a new one")

// op is one step of one task.
type op struct {
	Kind     opKind
	Off, N   int64
	Contents uint64 // version for fill
}

type opKind int

const (
	opRead      opKind = iota // through Bytes
	opReadAt                  // through ReadAt
	opWrite                   // through Bytes
	opWriteAt                 // through WriteAt
	opPageOut                 //
	opPopulate                // for reading
	opPopulateW               // for writing
	opRemap                   // unmap and map again
	opDiscard                 // of the whole pages inside
	opAdvise                  // Contents names the advice
	opSync                    //
	opWire                    // and unwire
	opSnapshot                // and read it
	opReadOnly                // read through a second, read-only mapping
	opEnd
)

var opNames = [...]string{"Read", "ReadAt", "Write", "WriteAt", "PageOut", "Populate", "PopulateWrite", "Remap", "Discard", "Advise", "Sync", "Wire", "Snapshot", "ReadOnly", "End"}

func (o op) String() string { return fmt.Sprintf("%s(%#x, %#x)", opNames[o.Kind], o.Off, o.N) }

type opResult struct {
	Data []byte // of reads
	Err  string
}

type mirrorArg struct {
	Socket   string
	Port     emm.Port // null: make an object
	Size     int64
	PageSize int
}

// mirror maps an object and does what it is told.
func mirror(c *conn) error {
	var arg mirrorArg
	if err := c.recv(&arg); err != nil {
		return err
	}
	ctx := context.Background()
	p, err := region.Dial(ctx, arg.Socket, nil)
	if err != nil {
		return err
	}
	defer p.Close()
	var o *region.Object
	if arg.Port.IsNull() {
		o, err = p.ObjectCreate(ctx, arg.Size, &region.ObjectOptions{PageSize: arg.PageSize})
	} else {
		o, err = p.ObjectOpen(ctx, arg.Port)
	}
	if err != nil {
		return err
	}
	r, err := o.Map(ctx, nil)
	if err != nil {
		return err
	}
	if err := c.send(o.Port()); err != nil {
		return err
	}
	for {
		var o1 op
		if err := c.recv(&o1); err != nil {
			return err
		}
		var res opResult
		switch o1.Kind {
		case opRead:
			res.Data = bytes.Clone(r.Bytes()[o1.Off : o1.Off+o1.N])
		case opReadAt:
			res.Data = make([]byte, o1.N)
			_, err = r.ReadAt(res.Data, o1.Off)
		case opWrite:
			fill(r.Bytes()[o1.Off:o1.Off+o1.N], o1.Off, o1.Contents)
		case opWriteAt:
			b := make([]byte, o1.N)
			fill(b, o1.Off, o1.Contents)
			_, err = r.WriteAt(b, o1.Off)
		case opPageOut:
			err = r.PageOut(ctx, o1.Off, o1.N)
		case opPopulate, opPopulateW:
			err = r.Populate(ctx, o1.Off, o1.N, o1.Kind == opPopulateW)
		case opDiscard:
			err = r.Discard(ctx, o1.Off, o1.N)
		case opAdvise:
			err = r.Advise(ctx, o1.Off, o1.N, region.Advice(o1.Contents%6))
		case opSync:
			err = r.Sync(ctx, o1.Off, o1.N)
		case opWire:
			if err = r.Wire(ctx, o1.Off, o1.N); err == nil {
				err = r.Unwire(ctx, o1.Off, o1.N)
			}
		case opSnapshot:
			var s *region.Object
			if s, err = o.Snapshot(ctx); err == nil {
				res.Data, err = readObject(ctx, s, o1.Off, o1.N)
				err = firstOf(err, s.Close())
			}
		case opReadOnly:
			res.Data, err = readObject(ctx, o, o1.Off, o1.N)
		case opRemap:
			if err = r.Close(); err == nil {
				r, err = o.Map(ctx, nil)
			}
		case opEnd:
			return firstOf(r.Close(), o.Close(), p.Close())
		}
		if errors.Is(err, emm.ResourceShortage) && (o1.Kind == opWire || o1.Kind == opPopulate || o1.Kind == opPopulateW) {
			err = nil // more than the budget: that is the answer
		}
		if err != nil {
			res.Err = err.Error()
		}
		if err := c.send(res); err != nil {
			return err
		}
	}
}

// readObject reads through a read-only mapping of its own.
func readObject(ctx context.Context, o *region.Object, off, n int64) ([]byte, error) {
	r, err := o.Map(ctx, &region.MapOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	b := bytes.Clone(r.Bytes()[off : off+n])
	return b, r.Close()
}

// TestMetamorphic runs random lists of operations in several processes on one object, one operation in each at the same time, and compares
// every byte read with a model in ordinary memory. Operations of one round never write the same byte, nor read one that another
// writes; but they share pages, and page-outs go where they like. The budget is smaller than the object.
func TestMetamorphic(t *testing.T) {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("rerun with: go test ./internal/e2e -run %s -seed %d", t.Name(), seed)
	configs := []struct {
		tasks, pages, pageSize int
		budget                 int // pages
		memory                 bool
	}{
		{2, 16, 4096, 1000, false}, // few pages: much contention
		{2, 40, 4096, 8, true},     // the smallest budget
		{4, 64, 4096, 12, false},
		{8, 300, 4096, 64, false},
		{3, 1200, 4096, 700, true}, // more than one 2 MiB extent
		{3, 40, 65536, 9, true},
		{2, 5, 2 << 20, 8, true},
		{1, 3000, 4096, 1000, false},
	}
	each := soak(12*time.Second) / time.Duration(len(configs))
	for i, cfg := range configs {
		t.Run(fmt.Sprintf("tasks=%d/pages=%d/pagesize=%d/budget=%d/memory=%v", cfg.tasks, cfg.pages, cfg.pageSize, cfg.budget, cfg.memory), func(t *testing.T) {
			resident := int64(cfg.budget) * int64(cfg.pageSize)
			socket, _ := pagerAt(t, pagerOptions{Resident: resident, Memory: cfg.memory})
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			over := watchBudget(t, socket, resident)
			mirrors(t, rng, socket, cfg.tasks, cfg.pages, cfg.pageSize, each)
			over()
		})
	}
}

// watchBudget looks, as often as it can, at what the kernel says is resident, until the returned function is called.
func watchBudget(t *testing.T, socket string, budget int64) func() {
	p, err := region.Dial(context.Background(), socket, nil)
	if err != nil {
		t.Fatal(err)
	}
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

func mirrors(t *testing.T, rng *rand.Rand, socket string, n, pages, pageSize int, d time.Duration) {
	size := int64(pages*pageSize - rng.IntN(pageSize)) // the last page may be partial
	model := make([]byte, size)
	ks := make([]*task, n)
	var port emm.Port
	for i := range ks {
		ks[i] = startFor(t, "mirror", d+patience, func(c *exec.Cmd) { c.Env = append(os.Environ(), "GOMAXPROCS=2") })
		ks[i].send(mirrorArg{socket, port, size, pageSize})
		ks[i].recv(&port)
	}
	var history []string
	rounds := 0
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
			}
			if errs[i] != nil {
				ks[i].fail(fmt.Errorf("round %d: %v: %w", rounds, o, errs[i]))
			}
		}
		for i, o := range ops {
			res := results[i]
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
	}
	for _, k := range ks {
		k.send(op{Kind: opEnd})
		k.wait()
	}
	t.Logf("%d rounds of %d operations", rounds, n)
}

// discarded is the whole pages inside a range. The last page of an object may be partial, and then no range has it whole.
func discarded(o op, pageSize, size int64) (a, b int64) {
	return min((o.Off+pageSize-1)/pageSize*pageSize, size), (o.Off + o.N) / pageSize * pageSize
}

// randomOps makes one operation for each of n tasks, such that their outcome does not depend on their order.
func randomOps(rng *rand.Rand, n int, size, pageSize int64, version uint64) []op {
	ops := make([]op, n)
	type span struct {
		off, end int64
		write    bool
	}
	var taken []span
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
			switch o.Kind {
			case opWire, opSnapshot:
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
				if !free(a, (o.Off+o.N+pageSize-1)/pageSize*pageSize-a, false) {
					continue
				}
			case opWrite, opWriteAt, opDiscard:
				if !free(o.Off, o.N, true) {
					continue
				}
			}
			ops[i] = o
			break
		}
	}
	return ops
}
