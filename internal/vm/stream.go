package vm

import (
	"sync/atomic"
	"time"

	"machpager/internal/policy"
	"machpager/internal/vm/page"
)

// A stream of reads that has grown to whole extents is read ahead of its reader: while the thread uses one extent, the next are brought in by goroutines of their own, on another processor or while
// the manager's I/O is under way. Nothing tells where in its extents the reader is, for what is resident and mapped does not fault; so one page of each extent that was brought in this way, the first that
// the stream will come to, is left out of the mapping: the mark. Its first touch is a minor fault, which says that the stream has come so far, and the extents behind are asked for then.
//
// It begins with a demand fault whose window is an extent, with one extent ahead, and doubles with each mark that is met, up to maxStreamAhead and to a quarter of what the object may have. So no more
// is brought in for nothing than was used. Demand faults go first: what is brought in ahead waits for frames that are free, a bounded time, and is given up if there are none.
//
// A mark is a hint in the mapping of the task that reads. A page without an entry is nothing special: whoever touches it gets it, whatever became of the mark.

const (
	maxStreamAhead = 4  // extents
	streamShare    = 4  // what is ahead may be this part of what the object may have
	streamWorkers  = 2  // extents that are brought in at once, where the manager answers in the call
	streamJobs     = 64 // that wait; more are dropped
	// streamPatience is how long an extent that is brought in ahead waits for frames.
	streamPatience = 3 * time.Millisecond
)

// aheadJob is an extent to be brought in.
type aheadJob struct {
	m     *Mapping
	first int64 // page
	mark  mark
}

// mark is a page left out of a mapping. The zero mark is none.
type mark struct {
	page  int64 // and one: 0 is none
	depth int64 // extents that were ahead when it was made
}

func markAt(p, depth int64) mark { return mark{p + 1, depth} }

// in reports whether the mark is one of the pages [a, b).
func (k mark) in(a, b int64) bool { return a < k.page && k.page <= b }

// marks are those of a mapping: those made last.
type marks struct {
	all  [2 * maxStreamAhead]atomic.Uint64 // page+1 << 8 | depth; 0: none
	next atomic.Uint32
}

func (s *marks) put(k mark) {
	s.all[s.next.Add(1)%uint32(len(s.all))].Store(uint64(k.page)<<8 | uint64(k.depth))
}

// hit takes the mark at page p, if there is one, and returns how many extents were ahead when it was made; 0: there is none.
func (s *marks) hit(p int64) (depth int64) {
	if s.next.Load() == 0 {
		return 0
	}
	for i := range s.all {
		if x := s.all[i].Load(); x>>8 == uint64(p+1) && s.all[i].CompareAndSwap(x, 0) {
			return int64(x & 0xff)
		}
	}
	return 0
}

// cont is Mapping.cont but for the mark, which is noted.
func (k mark) cont(m *Mapping, a, b int64, wp bool) {
	if !k.in(a, b) {
		m.cont(a, b, wp)
		return
	}
	p := k.page - 1
	m.marks.put(k)
	m.cont(a, p, wp)
	m.cont(p+1, b, wp)
}

// marked says that a read has met the mark at page p: the stream goes on, though nothing was missing here. For the fault reader.
func (m *Mapping) marked(p, depth int64) {
	w := m.pattern.at(p).Fault(p)
	m.obj.dropBehind(w)
	m.goOn(p, w, min(2*depth, maxStreamAhead))
}

// goOn asks for the extents behind the window w of a stream of reads that is at page p, if it ends with an extent and is most of one: so many, as far as they are not there and may be. (copy touches
// the end of its piece first, so that a stream of copies has hardly ever a whole extent before it.) It never waits.
func (m *Mapping) goOn(p int64, w policy.Window, depth int64) {
	o, n := m.obj, m.obj.extentPages()
	next, down := w.First+w.N, w.First < p
	if down {
		next = w.First
	}
	if n == 1 || 2*w.N < n || next&(n-1) != 0 || !o.vm.frames.Extents() || o.binding.Load() == nil || m.task.yields(time.Now()) {
		return
	}
	if c := o.attrs.Load().ClusterSize; c != 0 && c>>o.shift < n || o.cluster != 0 {
		return
	}
	depth = min(depth, o.allowance()/streamShare/extentSize)
	first, last := m.pages()
	last = min(last, o.limit.Load())
	for i := range depth {
		a := next + i*n
		k := markAt(a, depth)
		if down {
			a = next - (i+1)*n
			k = markAt(a+n-1, depth)
		}
		if a < first || a+n > last {
			return
		}
		if o.word(a).State() != page.Absent {
			continue
		}
		select {
		case o.vm.aheadJobs <- aheadJob{m, a, k}:
		default:
			return
		}
	}
}

// readAhead brings in what goOn has asked for.
func (v *VM) readAhead() {
	for {
		select {
		case <-v.ctx.Done():
			return
		case j := <-v.aheadJobs:
			j.bring()
		}
	}
}

func (j aheadJob) bring() {
	m, o := j.m, j.m.obj
	n := o.extentPages()
	f := int64(o.framesOf(n))
	o.vm.wanted.Add(f) // here, not when it is asked for: no more than the workers can bring in is made room for
	defer o.vm.wanted.Add(-f)
	if !m.gate.enter() {
		return
	}
	defer m.gate.leave()
	if !o.gate.enter() {
		return
	}
	defer o.gate.leave()
	for start, wait := time.Now(), 20*time.Microsecond; o.vm.freeFrames() < f+o.vm.lastFrames(); wait *= 2 {
		if o.word(j.first).State() != page.Absent || time.Since(start) > streamPatience || o.vm.ctx.Err() != nil {
			return
		}
		o.vm.kickNow()
		time.Sleep(wait)
	}
	m.askRun(j.first, j.first+n, &asking{}, j.mark)
}

// dropBehind advises cold what a window says is behind its stream.
func (o *Object) dropBehind(w policy.Window) {
	if w.BehindN > 0 {
		o.cold(w.BehindFirst, w.BehindFirst+w.BehindN)
	}
}
