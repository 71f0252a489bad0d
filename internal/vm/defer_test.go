package vm

import (
	"testing"
	"time"

	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// Faults that wait for a manager that never answers cost nothing but a look now and then, and none is lost when it does.
func TestDeferredRest(t *testing.T) {
	v := newVM(t, 16<<20)
	v.taskFaults = 4
	const pages = 64
	s := &shelf{}
	o := newObject(t, v, ObjectOptions{Size: pages * 4096, Manager: s, Port: emm.NewPort(), ClusterSize: 4096})
	x := startTask(t, v)
	m := x.mapObject(o, 1, 0, o.Size(), false)
	s.forget.Store(true)
	start := time.Now()
	for p := range int64(pages) {
		m.fault(p, faulter{ev: page.FaultRead, tid: uint32(1000 + p), start: time.Now(), retry: true}) // the reader alone looks for patterns
	}
	v.kickNow()
	time.Sleep(100 * time.Millisecond)
	tries := v.counters.deferred.Load()
	// Each is put aside once, and again each time the daemon looks: every millisecond, and when it is told of a new one.
	if most := pages * (2*pages + int64(time.Since(start)/time.Millisecond)); tries > most {
		t.Errorf("%d faults were put aside %d times in %v, want at most %d", pages, tries, time.Since(start), most)
	}
	t.Logf("%d faults were put aside %d times in %v", pages, tries, time.Since(start))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Microsecond) {
		if resident, _, _ := o.count(0, pages); resident == pages {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not all faults were answered: %+v", o.Stats())
		}
		s.ctl.DataUnavailable(emm.Run{Off: 0, Size: o.Size()})
	}
}
