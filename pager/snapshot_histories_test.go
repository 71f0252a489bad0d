package pager

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

// Histories of returns, requests, snapshots and ends of many objects, against the model of each.
func TestSnapshotHistories(t *testing.T) {
	boom := errors.New("boom")
	open := map[string]func(testing.TB) store.Store{"faulty": func(t testing.TB) store.Store {
		f := storetest.NewFaulty(memoryStore(t, nil))
		var mu sync.Mutex
		n := 0
		seventh := func(store.Slot, int) bool { mu.Lock(); defer mu.Unlock(); n++; return n%7 == 0 }
		f.Inject(storetest.Fault{Label: "write", On: storetest.OnWrite, Match: seventh, Err: boom})
		f.Inject(storetest.Fault{Label: "full", On: storetest.OnAlloc, Match: seventh, Err: store.ErrNoSpace})
		f.Inject(storetest.Fault{Label: "read", On: storetest.OnRead, Match: seventh, Err: boom})
		f.Inject(storetest.Fault{Label: "slow", On: storetest.OnWrite, Match: seventh, Delay: 20 * time.Microsecond})
		return f
	}}
	for name, o := range stores {
		open[name] = o
	}
	for name, open := range open {
		for _, pageSize := range []int{4096, 16384} {
			t.Run(fmt.Sprint(name, "/", pageSize), func(t *testing.T) {
				rapid.Check(t, func(rt *rapid.T) {
					s := open(t)
					p := newPager(t, s)
					h := &snapshots{p: p, pageSize: pageSize, mayFail: name == "faulty"}
					rt.Repeat(map[string]func(*rapid.T){
						"create":   h.create,
						"return":   h.give,
						"request":  h.ask,
						"wait":     h.wait,
						"snapshot": h.snapshot,
						"end":      h.end,
					})
					h.wait(rt)
					for len(h.live) > 0 {
						h.live[0].Read(emm.Run{Size: h.live[0].pages * int64(pageSize)})
						h.end(rt)
					}
					checkEmpty(t, p, s)
					s.Close()
				})
			})
		}
	}
}

// snapshots is a history.
type snapshots struct {
	p        *Pager
	pageSize int
	mayFail  bool
	live     []*subject
	seed     uint64
}

// subject is an object in a history. Pages are in at most one message.
type subject struct {
	vm
	pages    int64
	loans    map[int64]*emmtest.Loan
	requests map[int64]*emmtest.Request
}

func (h *snapshots) add(k vm, pages int64) {
	k.MayFail = h.mayFail
	h.live = append(h.live, &subject{k, pages, make(map[int64]*emmtest.Loan), make(map[int64]*emmtest.Request)})
}

func (h *snapshots) create(t *rapid.T) {
	if len(h.live) > 6 {
		return
	}
	k := vm{port: emm.NewPort()}
	pages := rapid.SampledFrom([]int64{16, 16, 3 * chunkPages}).Draw(t, "size")
	if rapid.Bool().Draw(t, "temporary") {
		k.Kernel = emmtest.NewKernel(t, h.p, k.port, h.pageSize)
		k.Create(emm.NewPort(), pages*int64(h.pageSize))
	} else if err := h.p.ObjectCreate(k.port, pages*int64(h.pageSize), h.pageSize); err != nil {
		t.Fatal(err)
	} else {
		k = vmOf(t, h.p, k.port, h.pageSize)
	}
	h.add(k, pages)
}

// draw draws an object, and a run of its pages that nothing is outstanding for.
func (h *snapshots) draw(t *rapid.T) (x *subject, page, n int64) {
	if len(h.live) == 0 {
		return nil, 0, 0
	}
	x = rapid.SampledFrom(h.live).Draw(t, "object")
	page = rapid.Int64Range(0, 7).Draw(t, "page")
	if x.pages > 16 {
		page += rapid.SampledFrom([]int64{0, chunkPages - 8, 2*chunkPages - 4}).Draw(t, "chunk")
	}
	most := rapid.Int64Range(1, 8).Draw(t, "pages")
	for n < most {
		l, r := x.loans[page+n], x.requests[page+n]
		if l != nil && !l.Done() || r != nil && !r.Done() {
			break
		}
		n++
	}
	return x, page, n
}

func (h *snapshots) give(t *rapid.T) {
	x, page, n := h.draw(t)
	if n == 0 {
		return
	}
	h.seed++
	data := emmtest.Fill(int(n), int64(h.pageSize), h.seed)
	if rapid.IntRange(0, 2).Draw(t, "zeros") == 0 {
		clear(data[:h.pageSize])
	}
	l := x.Give(page*int64(h.pageSize), data, false)
	for i := range n {
		x.loans[page+i] = l
	}
}

func (h *snapshots) ask(t *rapid.T) {
	x, page, n := h.draw(t)
	if n == 0 {
		return
	}
	r := x.Ask(emm.Run{Off: page * int64(h.pageSize), Size: n * int64(h.pageSize)}, page*int64(h.pageSize))
	for i := range n {
		x.requests[page+i] = r
	}
}

func (h *snapshots) wait(*rapid.T) {
	for _, x := range h.live {
		for _, l := range x.loans {
			l.Wait()
		}
		for _, r := range x.requests {
			r.Wait()
		}
	}
}

func (h *snapshots) snapshot(t *rapid.T) {
	if len(h.live) == 0 || len(h.live) > 10 {
		return
	}
	x := rapid.SampledFrom(h.live).Draw(t, "source")
	h.add(x.vm.snapshot(t, h.p, h.pageSize), x.pages)
}

func (h *snapshots) end(t *rapid.T) {
	if len(h.live) == 0 {
		return
	}
	i := rapid.IntRange(0, len(h.live)-1).Draw(t, "ended")
	x := h.live[i]
	h.live = append(h.live[:i], h.live[i+1:]...)
	if rapid.Bool().Draw(t, "order") {
		h.p.NoSenders(x.port)
	}
	x.vm.end(h.p, slices.Collect(maps.Values(x.loans))...)
}
