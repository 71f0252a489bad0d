package vm

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A reader that takes little of a CPU asks for a short slice, one that takes much does not; and the second keeps to small pieces while the first, another task's, has faults.
func TestSlice(t *testing.T) {
	runtime.LockOSThread() // not unlocked: the thread ends with the test
	v := &VM{}
	x, y := &Task{vm: v, id: 1}, &Task{vm: v, id: 2}
	x.slice.begin()
	asked := func() time.Duration {
		a, err := unix.SchedGetAttr(0, 0)
		if err != nil {
			t.Fatal(err)
		}
		return time.Duration(a.Runtime)
	}
	usual := func() time.Duration {
		defer x.slice.set(x.slice.light)
		x.slice.set(false)
		return asked()
	}()
	// Before Linux 6.12 a slice cannot be chosen, and none is told.
	if got := asked(); usual != 0 && (!x.slice.asks || got != shortSlice) {
		t.Errorf("a reader begins with a slice of %v, want %v", got, shortSlice)
	}
	x.turn(time.Now())
	if x.yields(time.Now()) {
		t.Error("a light reader yields")
	}
	for end := cpuTime() + 2*sliceEvery; cpuTime() < end; {
	}
	// However long that took: so much of a CPU is busy in the time that it is given here.
	x.slice.begun = time.Now().Add(-2 * sliceEvery)
	now := time.Now()
	x.turn(now)
	if got := asked(); x.slice.light || got != usual {
		t.Errorf("a reader that is busy has a slice of %v, want %v", got, usual)
	}
	if x.yields(now) {
		t.Error("it yields to itself")
	}
	y.slice.light, y.slice.begun = true, now // its own thread would look
	later := now.Add(2 * lightNoted)
	y.turn(now.Add(lightNoted + 1))
	if !x.yields(later) {
		t.Error("it does not yield to another")
	}
	if x.yields(later.Add(2 * lightFor)) {
		t.Error("it yields for ever")
	}
	x.slice.begun = time.Now().Add(-time.Minute)
	if x.turn(time.Now()); !x.slice.light {
		t.Error("a reader that has rested is still taken for busy")
	}
}
