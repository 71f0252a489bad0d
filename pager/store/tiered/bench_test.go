package tiered

import (
	"fmt"
	"math/rand"
	"testing"
	"time"

	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

// Reads with a Zipf distribution over four times what the fast tier holds: is it worth it to move what is read again?
func BenchmarkZipfReads(b *testing.B) {
	for _, delay := range []time.Duration{0, 200 * time.Microsecond} {
		for _, promote := range []bool{false, true} {
			b.Run(fmt.Sprintf("slow=%v/promote=%v", delay, promote), func(b *testing.B) {
				x := open(b, Options{Promote: promote}, 8<<20)
				var slots []store.Slot
				for i := range 4 * 16 * 64 { // text: about 16 MiB of it fit the fast tier
					slot, _ := put(b, x.s, 4, storetest.Text, uint64(i))
					for k := range store.Slot(4) {
						slots = append(slots, slot+k)
					}
				}
				rand.New(rand.NewSource(1)).Shuffle(len(slots), func(i, j int) { slots[i], slots[j] = slots[j], slots[i] })
				time.Sleep(100 * time.Millisecond)
				if delay > 0 {
					x.slow.Inject(storetest.Fault{Label: "slow", On: storetest.OnRead, Delay: delay})
				}
				z := rand.NewZipf(rand.New(rand.NewSource(2)), 1.1, 8, uint64(len(slots)-1))
				done := make(chan struct{}, 1)
				op := &store.Op{Data: make([]byte, store.SlotSize), Done: func(*store.Op) { done <- struct{}{} }}
				before := x.s.slow.Counters()
				b.ResetTimer()
				for range b.N {
					op.Slot = slots[z.Uint64()]
					x.s.Read(op)
					if <-done; op.Err != nil {
						b.Fatal(op.Err)
					}
				}
				b.StopTimer()
				b.ReportMetric(100*float64(x.s.slow.Counters().In-before.In-(x.s.Stats().Promoted))/float64(b.N), "%slow")
			})
		}
	}
}

func BenchmarkStore(b *testing.B) {
	storetest.Benchmark(b, func(b testing.TB) store.Store { return open(b, Options{}, 64<<20).s })
}
