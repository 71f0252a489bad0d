package vm

import (
	"sync"
	"sync/atomic"
	"testing"
)

func TestGate(t *testing.T) {
	for range 2000 {
		g := newGate()
		var inside atomic.Int64
		closed := atomic.Bool{}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 50 {
					if g.enter() {
						inside.Add(1)
						if closed.Load() {
							t.Error("inside a closed gate")
						}
						inside.Add(-1)
						g.leave()
					}
				}
			})
		}
		firsts := atomic.Int64{}
		for range 2 {
			wg.Go(func() {
				if g.close() {
					firsts.Add(1)
				}
				if inside.Load() != 0 {
					t.Error("closed with somebody inside")
				}
				closed.Store(true)
			})
		}
		wg.Wait()
		if firsts.Load() != 1 {
			t.Fatalf("%d first closers", firsts.Load())
		}
	}
}

func TestHistogram(t *testing.T) {
	for ns := int64(0); ns < 1<<20; ns += 1 + ns/64 {
		i := bucketOf(ns)
		if top := bucketTop(i); ns > top || i > 0 && ns <= bucketTop(i-1) {
			t.Fatalf("%d ns in bucket %d (%d, %d]", ns, i, bucketTop(i-1), top)
		}
	}
	var h histogram
	for i := int64(1); i <= 1000; i++ {
		h.record(i * 1000)
	}
	if p := h.quantile(0.5); p < 480_000 || p > 580_000 {
		t.Errorf("p50 of 1..1000 us: %v", p)
	}
}
