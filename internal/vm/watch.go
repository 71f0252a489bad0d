package vm

import "time"

const (
	watchEvery = time.Second
	// slowAfter is when an unanswered data request or data return is logged: nothing blocks for ever without saying so.
	slowAfter = 10 * time.Second
	// stalledAfter is when nobody counts on the frames of an uncompleted data return any more: others must go in their place. It is looked at every watchEvery.
	stalledAfter = time.Second
)

// watchRequests logs what managers leave unanswered. It also looks after files of ended objects that tasks have kept.
func (v *VM) watchRequests() {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	slow := slowWaits{}
	for {
		select {
		case <-v.ctx.Done():
			return
		case <-tick.C:
		}
		v.watchSlow(v.log, slow, time.Now())
		v.counters.scrubbed.Add(v.frames.Reap() / frameSize)
		for _, o := range v.allObjects() {
			o.watch()
			o.watchSyncs()
		}
	}
}

func (o *Object) watch() {
	o.reqMu.Lock()
	defer o.reqMu.Unlock()
	for _, r := range o.requests {
		if age := time.Since(r.f.start); age > slowAfter && !r.reported {
			r.reported = true
			o.vm.log.Warn("a data request is unanswered", "object", o.id, "off", r.a<<o.shift, "size", (r.b-r.a)<<o.shift, "age", age)
		}
	}
	for _, d := range o.returns {
		if d.counted && time.Since(d.start) > stalledAfter {
			o.landed(d)
			o.stalled.Store(true)
			o.vm.kickDeferred()
		}
		if age := time.Since(d.start); age > slowAfter && !d.reported {
			d.reported = true
			o.vm.log.Warn("a data return is not completed", "object", o.id, "off", d.a<<o.shift, "size", (d.b-d.a)<<o.shift, "age", age)
		}
	}
}
