package vm

import (
	"cmp"
	"log/slog"
	"slices"
	"time"
)

// Wait is something that is out, and perhaps somebody who waits for it.
type Wait struct {
	Object uint64        `json:"object"`
	Off    int64         `json:"off"`        // bytes; of the page that is waited for, if one is
	Size   int64         `json:"size_bytes"` // of all that was asked for or returned
	For    string        `json:"for"`        // one of ForManager, ForStore, ForFrame
	Age    time.Duration `json:"age_ns"`
	Page   string        `json:"page"`    // the word of the page at Off
	Thread bool          `json:"thread"`  // a thread waits for it
	PID    int           `json:"pid"`     // of the task whose thread it is; 0: not known
	TID    uint32        `json:"tid"`     // as the task numbers it; 0: not known
	Mapped uint64        `json:"mapping"` // through which it came; 0: not known
}

// What a fault can wait for longer than a moment.
const (
	ForManager = "a data request: its manager has not answered"
	ForStore   = "a data return: its manager has not stored it yet"
	ForFrame   = "a frame: all are in use, or its object is at its maximum"
)

// waits are the data requests and data returns that are out, and the faults that were put aside, oldest first. Everything that makes a fault wait for long is among
// them: who owns a page otherwise is in the middle of system calls.
func (v *VM) waits() []Wait {
	var list []Wait
	for _, o := range v.allObjects() {
		list = o.waits(list)
	}
	v.deferMu.Lock()
	for _, d := range v.deferred {
		if !d.m.obj.gate.enter() {
			continue
		}
		w := Wait{Object: d.m.obj.id, Off: d.p << d.m.obj.shift, Size: d.m.obj.pageSize, For: ForFrame, Age: time.Since(d.f.start), Page: d.m.obj.word(d.p).String(),
			Thread: true, TID: d.f.tid, Mapped: d.m.id}
		if d.m.task != nil {
			w.PID = d.m.task.pid
		}
		d.m.obj.gate.leave()
		list = append(list, w)
	}
	v.deferMu.Unlock()
	slices.SortStableFunc(list, func(a, b Wait) int { return cmp.Compare(b.Age, a.Age) })
	return list
}

// waits appends what is out for o.
func (o *Object) waits(list []Wait) []Wait {
	if !o.gate.enter() { // its table may be gone
		return list
	}
	defer o.gate.leave()
	o.reqMu.Lock()
	defer o.reqMu.Unlock()
	for _, r := range o.requests {
		w := o.waitOn(r.a, r.b, r.need)
		w.For, w.Age, w.Mapped = ForManager, time.Since(r.f.start), r.m.id
		if r.m.task != nil {
			w.PID = r.m.task.pid
		}
		if r.need >= 0 {
			w.TID = r.f.tid
		}
		list = append(list, w)
	}
	for _, d := range o.returns {
		w := o.waitOn(d.a, d.b, -1)
		w.For, w.Age = ForStore, time.Since(d.start)
		list = append(list, w)
	}
	return list
}

// waitOn describes the pages [a, b), of which a thread waits for need (-1: none is known to), or for one whose word says so.
func (o *Object) waitOn(a, b, need int64) Wait {
	w := Wait{Object: o.id, Size: (b - a) << o.shift, Thread: need >= 0}
	if need < 0 {
		need = a
		for p := a; p < b; p++ {
			if o.word(p).Waiters() {
				need, w.Thread = p, true
				break
			}
		}
	}
	w.Off, w.Page = need<<o.shift, o.word(need).String()
	return w
}

const (
	// slowFault is when a thread has waited so long that the log says for what.
	slowFault = time.Second
	// slowMost is how many such waits one look logs; the others are counted.
	slowMost = 8
)

// slowWaits are the waits that were logged. It belongs to the goroutine that looks.
type slowWaits map[slowKey]*slowWait

type slowKey struct {
	object uint64
	off    int64
}

type slowWait struct {
	began  time.Time
	quiet  bool // logged only as one of several
	missed int  // looks that did not see it
}

// watchSlow logs each fault that has waited for a second, with its cause, and again when it waits no more.
func (v *VM) watchSlow(log *slog.Logger, slow slowWaits, now time.Time) {
	told, more := 0, 0
	for _, w := range slow {
		w.missed++
	}
	for _, w := range v.waits() {
		if !w.Thread || w.Age < slowFault {
			continue
		}
		k := slowKey{w.Object, w.Off}
		if s := slow[k]; s != nil {
			s.missed = 0
			continue
		}
		s := &slowWait{began: now.Add(-w.Age), quiet: told == slowMost}
		slow[k] = s
		if s.quiet {
			more++
			continue
		}
		told++
		log.Warn("a fault waits", "object", w.Object, "off", w.Off, "page", w.Page, "for", w.For, "size", w.Size, "age", w.Age.Round(time.Millisecond), "pid", w.PID, "tid", w.TID)
	}
	if more > 0 {
		log.Warn("more faults wait", "count", more)
	}
	for k, s := range slow {
		if s.missed < 2 { // faults that were put aside are being looked at, now and then
			continue
		}
		delete(slow, k)
		if !s.quiet {
			log.Info("a fault waits no more", "object", k.object, "off", k.off, "page", v.wordOf(k), "after", now.Sub(s.began).Round(time.Millisecond))
		}
	}
}

// wordOf is the word of a page, for the log.
func (v *VM) wordOf(k slowKey) string {
	v.mu.Lock()
	o := v.objects[k.object]
	v.mu.Unlock()
	if o == nil || !o.gate.enter() {
		return "its object has ended"
	}
	defer o.gate.leave()
	return o.word(k.off >> o.shift).String()
}
