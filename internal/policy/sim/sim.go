// Package sim drives the policies of package policy with traces of page references, and shows them no more than a pager sees: faults, and at most a small part
// of the touches of resident pages. What no pager can know is here to compare with: least recently used with every touch known (LRU), and the optimum that
// knows the future (Optimal).
package sim

import (
	"container/heap"
	"math/rand/v2"

	"machpager/internal/policy"
)

// Trace is references to pages of one frame each, of one object.
type Trace struct {
	Name   string
	Skewed bool // a minority of the pages gets most of the references: a policy should find them
	Better bool // there is something to learn: a policy should not do worse than FIFO, not even by chance
	Pages  []int32
	Hot    []bool // by reference: it is to a page of the hot set; nil: there is none
	Max    int32  // pages are below
}

// Result counts references after the warm-up.
type Result struct {
	References, Misses       int64
	HotReferences, HotMisses int64
	Evicted, Runs            int64 // pages, and the runs they were evicted in
}

// Ratio is misses per reference.
func (r Result) Ratio() float64 { return float64(r.Misses) / float64(max(1, r.References)) }

// HotRatio is misses per reference of the hot set.
func (r Result) HotRatio() float64 { return float64(r.HotMisses) / float64(max(1, r.HotReferences)) }

// warmUp is the part of a trace that is not counted.
const warmUp = 4 // 1/warmUp

func (t *Trace) count(r *Result, i int, miss bool) {
	if i < len(t.Pages)/warmUp {
		return
	}
	r.References++
	hot := t.Hot != nil && t.Hot[i]
	if hot {
		r.HotReferences++
	}
	if miss {
		r.Misses++
		if hot {
			r.HotMisses++
		}
	}
}

// Config of a run.
type Config struct {
	Capacity int64
	Visible  int   // one touch of a resident page in so many is seen by the policy; 0: none
	Cluster  int64 // a fault fills the absent pages of an aligned cluster of so many; 0: 1
	Batch    int64 // so many are evicted at once; 0: 1
	Seed     uint64
}

// Policy is the part of policy.Replacement that a simulation needs.
type Policy interface {
	Fill(r policy.Run, unit, need int64)
	Touch(object uint64, frame int64)
	Victims(want int64, dst []policy.Run) []policy.Run
}

// Run lets p manage Capacity frames.
func Run(t *Trace, p Policy, c Config) Result {
	var r Result
	rnd := rand.New(rand.NewPCG(c.Seed, 1))
	c.Cluster, c.Batch = max(1, c.Cluster), max(1, c.Batch)
	resident := make([]bool, int64(t.Max)+c.Cluster)
	var dst []policy.Run
	used := int64(0)
	for i, page := range t.Pages {
		if resident[page] {
			if c.Visible > 0 && rnd.IntN(c.Visible) == 0 {
				p.Touch(1, int64(page))
			}
			t.count(&r, i, false)
			continue
		}
		t.count(&r, i, true)
		need := int64(page)
		a, b := need, need+1
		lo := need / c.Cluster * c.Cluster
		for b < lo+c.Cluster && !resident[b] {
			b++
		}
		for a > lo && !resident[a-1] {
			a--
		}
		if used+b-a > c.Capacity {
			dst = p.Victims(max(c.Batch, used+b-a-c.Capacity), dst[:0])
			for _, v := range dst {
				if i >= len(t.Pages)/warmUp {
					r.Runs++
					r.Evicted += v.N
				}
				used -= v.N
				for f := v.First; f < v.First+v.N; f++ {
					if !resident[f] {
						panic("BUG: a victim is not resident")
					}
					resident[f] = false
				}
			}
		}
		p.Fill(policy.Run{Object: 1, First: a, N: b - a}, 1, need)
		for f := a; f < b; f++ {
			resident[f] = true
		}
		if used += b - a; used > c.Capacity {
			panic("BUG: over capacity")
		}
	}
	return r
}

// LRU evicts the page whose last reference is the longest ago, with every reference known.
func LRU(t *Trace, capacity int64) Result {
	var r Result
	const none = -1
	type links struct{ prev, next int32 }
	list := make([]links, t.Max+1) // list[t.Max] is the ring's head
	head := t.Max
	for i := range list {
		list[i] = links{none, none}
	}
	list[head] = links{head, head}
	used := int64(0)
	unlink := func(p int32) {
		list[list[p].prev].next, list[list[p].next].prev = list[p].next, list[p].prev
		list[p] = links{none, none}
	}
	for i, p := range t.Pages {
		hit := list[p].prev != none
		t.count(&r, i, !hit)
		switch {
		case hit:
			unlink(p)
		case used == capacity:
			unlink(list[head].next)
		default:
			used++
		}
		last := list[head].prev
		list[p] = links{last, head}
		list[last].next, list[head].prev = p, p
	}
	return r
}

// Optimal evicts the page whose next reference is the farthest away (Belady 1966).
func Optimal(t *Trace, capacity int64) Result {
	var r Result
	n := int32(len(t.Pages))
	next := make([]int32, n)
	seen := make([]int32, t.Max)
	for i := range seen {
		seen[i] = n
	}
	for i := n - 1; i >= 0; i-- {
		next[i], seen[t.Pages[i]] = seen[t.Pages[i]], i
	}
	due := make([]int32, t.Max) // of resident pages: the next reference; -1: not resident
	for i := range due {
		due[i] = -1
	}
	h := &farthest{}
	used := int64(0)
	for i, p := range t.Pages {
		hit := due[p] >= 0
		t.count(&r, i, !hit)
		if !hit {
			for used == capacity {
				v := heap.Pop(h).(reference)
				if due[v.page] == v.at { // else it was referenced since
					due[v.page] = -1
					used--
				}
			}
			used++
		}
		due[p] = next[i]
		heap.Push(h, reference{p, next[i]})
	}
	return r
}

type reference struct{ page, at int32 }

type farthest []reference

func (h farthest) Len() int           { return len(h) }
func (h farthest) Less(i, j int) bool { return h[i].at > h[j].at }
func (h farthest) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *farthest) Push(x any)        { *h = append(*h, x.(reference)) }
func (h *farthest) Pop() any {
	old := *h
	x := old[len(old)-1]
	*h = old[:len(old)-1]
	return x
}
