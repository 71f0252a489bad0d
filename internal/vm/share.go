package vm

import (
	"slices"
	"time"
)

// Frames go to who uses them, as the policy sees it, and a task that touches memory as fast as it can uses all there are. So half of the budget is dealt out evenly, as far as tasks want it: a task that
// has no more than its share of that is spared while others have more. Page-out takes from the others first, and they leave it the last frames of the reserve. An object counts for the task that mapped it
// first, of those that still do. What is above the shares is the policy's: between two tasks that both want more, and for one that is alone, nothing changes.

const (
	dealEvery = 10 * time.Millisecond
	// dealCost bounds the time that dealing takes: with very many objects it is done less often.
	dealCost = 20
)

// dealing is when shares were dealt. The page-out daemon's alone.
type dealing struct {
	next time.Time
	got  map[*Task]int64 // frames; kept for the next time
	all  []int64
}

// deal looks who has how much, and says which objects are spared.
func (v *VM) deal() {
	start := time.Now()
	d := &v.dealing
	if start.Before(d.next) {
		return
	}
	objects := v.allObjects()
	if d.got == nil {
		d.got = map[*Task]int64{}
	}
	clear(d.got)
	for _, o := range objects {
		if t := o.charged(); t != nil {
			d.got[t] += o.resident.Load()
		}
	}
	d.all = d.all[:0]
	for _, f := range d.got {
		d.all = append(d.all, f)
	}
	share, contended := share(d.all, v.frames.Budget()/frameSize/2), false
	for _, o := range objects {
		t := o.charged()
		spared := t != nil && d.got[t] <= share
		o.spared.Store(spared)
		contended = contended || spared
	}
	v.contended.Store(contended)
	d.next = time.Now().Add(max(dealEvery, dealCost*time.Since(start)))
}

// charged is the task that an object counts for; nil: nobody has it mapped.
func (o *Object) charged() *Task {
	for _, m := range *o.maps.Load() {
		if m.task != nil {
			return m.task
		}
	}
	return nil
}

// share is the level that fills so many frames, when nobody gets more than he has: who has no more than that is spared. It sorts have.
func share(have []int64, frames int64) int64 {
	slices.Sort(have)
	for i, f := range have {
		level := frames / int64(len(have)-i)
		if f > level {
			return level
		}
		frames -= f
	}
	if len(have) == 0 {
		return 0
	}
	return have[len(have)-1] // there is more than they want
}

// lastFrames is how many free frames are left to tasks that are spared.
func (v *VM) lastFrames() int64 {
	low, _ := v.water()
	return low / 2
}

// mayTake is how many of n pages the object may reserve frames for: those that are not spared leave the last.
func (o *Object) mayTake(n int64) int64 {
	if !o.vm.contended.Load() || o.spared.Load() {
		return n
	}
	return leaving(n, int64(o.framesOf(1)), o.vm.freeFrames(), o.vm.lastFrames())
}

// leaving is how many of n pages can be had of the free frames when the last are left. Page-out makes no more frames free than twice the last: where a page needs
// more than these, leaving them would mean to wait for ever.
func leaving(n, page, free, last int64) int64 {
	if page > last {
		return n
	}
	return max(0, min(n, (free-last)/page))
}
