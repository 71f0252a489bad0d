package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/region"
)

func init() {
	tasks["sluggish user"] = using(sluggishUser)
	tasks["onlooker"] = using(onlooker)
}

// sluggishTime is how long a sluggish manager takes for each request and each return.
const sluggishTime = 50 * time.Millisecond

// sluggish is a manager that does eight things at a time, slowly.
type sluggish struct {
	faulty
	work chan func()
	end  sync.Once
}

func openSluggish(context.Context, string, *os.File) (emm.Manager, error) {
	m := &sluggish{faulty: faulty{mode: modeOK}, work: make(chan func(), 1<<12)}
	for range 8 {
		go func() {
			for f := range m.work {
				time.Sleep(sluggishTime)
				f()
			}
		}()
	}
	return m, nil
}

func (m *sluggish) DataRequest(h emm.Head, want emm.Run, _ int64, _ emm.Prot) emm.KernReturn {
	m.work <- func() { m.answer(h.Control, want) }
	return emm.Success
}

func (m *sluggish) DataReturn(h emm.Head, off int64, data []byte, dirty, kernelCopy bool) emm.KernReturn {
	m.work <- func() { m.faulty.DataReturn(h, off, data, dirty, kernelCopy) }
	return emm.Success
}

func (m *sluggish) Close() error {
	m.end.Do(func() { close(m.work) })
	return nil
}

// sluggishUser reads and writes memory of a sluggish manager, more than may be resident, in eight threads, until it is killed.
func sluggishUser(ctx context.Context, c *conn, p *region.Pager, _ At) error {
	const size = 16 << 20
	_, r, err := create(ctx, p, size, &region.ObjectOptions{Manager: "sluggish", ClusterSize: 64 << 10}, nil)
	if err != nil {
		return err
	}
	if _, err := r.ReadAt(make([]byte, 1), 0); err != nil {
		return err
	}
	if err := c.send(true); err != nil {
		return err
	}
	for g := range uint64(8) {
		go func() {
			random, b := rand.New(rand.NewPCG(g, 1)), []byte{1}
			for {
				off := random.Int64N(size)
				r.ReadAt(b, off)
				r.WriteAt(b, off)
			}
		}()
	}
	select {}
}

type onlookerArg struct {
	At
	Size     int64 // bytes that it uses
	Min      int64 // of them kept for it (ObjectOptions.ResidentMin)
	Duration time.Duration
}

// latencies are of one kind of access, sorted.
type latencies []time.Duration

func (l latencies) at(q float64) time.Duration { return l[min(len(l)-1, int(q*float64(len(l))))] }

// tail is p99, or where there are few samples, what ten of them are above: a single one says nothing of a loaded machine.
func (l latencies) tail() time.Duration { return l[max(0, min(len(l)-11, len(l)*99/100))] }

func (l latencies) String() string {
	return fmt.Sprintf("%d: p50 %v, p99 %v, max %v", len(l), l.at(0.5), l.at(0.99), l[len(l)-1])
}

// touched keeps touches from being optimised away.
var touched byte

type onlookerResult struct{ Touch, Protect, Sync latencies }

// onlooker uses memory of the default pager, and measures touches of it and first writes to clean pages of it.
func onlooker(ctx context.Context, c *conn, p *region.Pager, arg onlookerArg) error {
	r, err := p.Allocate(ctx, arg.Size, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{ResidentMin: arg.Min}})
	if err != nil {
		return err
	}
	b := newBook(r)
	for i := range b.versions {
		if err := b.put(i, 1); err != nil {
			return err
		}
	}
	var res onlookerResult
	random := rand.New(rand.NewPCG(3, 4))
	for end := time.Now().Add(arg.Duration); time.Now().Before(end); {
		for range 256 {
			i, off := random.IntN(len(b.versions)), random.IntN(4096)
			begin := time.Now()
			touched += b.page(i)[off]
			res.Touch = append(res.Touch, time.Since(begin))
		}
		begin := time.Now()
		if err := r.Sync(ctx, 0, arg.Size); err != nil { // clean, and write-protected
			return err
		}
		res.Sync = append(res.Sync, time.Since(begin))
		for range 16 {
			i := random.IntN(len(b.versions))
			begin := time.Now()
			b.page(i)[0] = b.page(i)[0]
			res.Protect = append(res.Protect, time.Since(begin))
		}
	}
	slices.Sort(res.Touch)
	slices.Sort(res.Protect)
	slices.Sort(res.Sync)
	if err := b.checkAll(); err != nil {
		return err
	}
	return c.send(res)
}

// residentAt is how much the pager has in memory.
func residentAt(t *testing.T, socket string) int64 {
	t.Helper()
	p := dial(t, socket)
	defer p.Close()
	info := infoOf(t, p)
	return info.Resident
}

// TestSlowManagerSlowsOnlyItsUsers: a manager that takes 50 ms for each request and return, in the same pager, is not noticed by others.
func TestSlowManagerSlowsOnlyItsUsers(t *testing.T) {
	for _, c := range []struct {
		name     string
		resident int64
		size     int64
		min      int64
	}{
		{"room for all", 64 << 20, 256 << 10, 0},
		{"page-out at work", 2 << 20, 256 << 10, 0},
		{"page-out at work, with a minimum", 2 << 20, 256 << 10, 256 << 10},
		{"both page out", 2 << 20, 4 << 20, 0},
		{"both page out, with a minimum", 2 << 20, 4 << 20, 512 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			socket, _ := pagerAt(t, pagerOptions{Resident: c.resident})
			measure := func() (r onlookerResult) {
				k := start(t, "onlooker", nil)
				k.send(onlookerArg{At: At{socket}, Size: c.size, Min: c.min, Duration: 700 * time.Millisecond})
				k.recv(&r)
				k.wait()
				return r
			}
			before := measure()
			slow := start(t, "sluggish user", nil)
			slow.send(At{socket})
			slow.ready()
			if c.resident < 16<<20 {
				eventually(t, 20*time.Second, "memory is full", func() bool { return residentAt(t, socket) > c.resident*7/8 })
			}
			during := measure()
			slow.cmd.Process.Kill()
			for _, m := range []struct {
				what           string
				before, during latencies
			}{{"touches", before.Touch, during.Touch}, {"first writes", before.Protect, during.Protect}, {"syncs", before.Sync, during.Sync}} {
				t.Logf("%s alone %v; beside a slow manager %v", m.what, m.before, m.during)
				// Who waited for the manager waited for all of its time; half is for a loaded machine.
				if limit := m.before.tail() + sluggishTime/2; m.during.tail() > limit {
					t.Errorf("%s: %v beside a slow manager, want at most %v", m.what, m.during.tail(), limit)
				}
			}
		})
	}
}
