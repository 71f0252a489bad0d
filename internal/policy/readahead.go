package policy

import (
	"math/bits"
	"sync/atomic"
)

// Advice is how a task says it will use memory (Mach: vm_behavior_t; Linux: madvise(2)). WillNeed and DontNeed are not among them: they ask for
// something to be done once, by the caller.
type Advice uint32

const (
	Normal            Advice = iota // find out
	Random                          // never read ahead
	Sequential                      // read far ahead from the first fault on, and drop what lies behind
	ReverseSequential               // the same downwards
)

const (
	maxStreams = 4 // followed at once in one mapping
	growth     = 4 // times the window, when a stream goes on
	keepBehind = 4 // pages left alone behind a stream: one instruction may need as many
)

// ReadAhead decides how many pages to ask for at a fault. It is told each page that a thread waited for and knows by that alone how memory is used: pages
// that were asked for in advance do not fault, so the next fault of a stream is where its window ended.
//
// A window begins with one page and grows to 4, 16, 64, ... with each fault that continues its stream. Up to four streams, forward and backward, may be
// interleaved. No window is larger than what its stream has proved already, or the ceiling, whichever is more: the ceiling falls when a stream ends before its window was
// used, and rises when windows of its size are. A fault inside a window, at a page that was taken away before it was used, makes the window smaller.
//
// Everything is in pages of the object. The methods, but SetAdvice, are for one goroutine at a time: the fault reader of the task. Nothing is allocated.
type ReadAhead struct {
	advice  atomic.Uint32
	max     int64 // immutable; the largest window
	ceiling int64 // 1 to max
	clock   uint64
	last    *stream // that the last fault belongs to
	streams [maxStreams]stream
}

// stream is faults side by side. Positions are pages times dir, so that they always grow.
type stream struct {
	dir    int64  // 1 forward, -1 backward, 0 not known yet: one fault only, positions are pages
	at     int64  // of the last fault
	got    int64  // behind what was filled then: the next fault is expected from here on
	end    int64  // behind what was asked for then
	window int64  // pages asked for then; 0: the slot is free
	run    int64  // pages from the first fault to the last
	behind int64  // the first that was not said to be behind
	used   uint64 // the clock at the last fault
}

// Window is what to ask for at a fault, in pages: [First, First+N), which includes the page itself and may reach beyond the mapping; and
// what is not needed any more, if BehindN is not 0.
type Window struct {
	First, N             int64
	BehindFirst, BehindN int64
}

// NewReadAhead makes one with windows of up to limit pages, a power of two up to 1<<20: normally an extent. 1: no read-ahead.
func NewReadAhead(limit int64) *ReadAhead {
	limit = int64(1) << (bits.Len64(uint64(max(1, min(limit, 1<<20)))) - 1)
	return &ReadAhead{max: limit, ceiling: limit}
}

// SetAdvice may be called by any goroutine. It counts from the next fault on.
func (r *ReadAhead) SetAdvice(a Advice) { r.advice.Store(uint32(a)) }

// Advice returns what was set, Normal if nothing was.
func (r *ReadAhead) Advice() Advice { return Advice(r.advice.Load()) }

// Fault says that a thread waits for page p, which is absent, and returns what to ask for.
func (r *ReadAhead) Fault(p int64) Window {
	advice := r.Advice()
	if advice == Random || r.max == 1 {
		r.last = nil
		return Window{First: p, N: 1}
	}
	r.clock++
	s := r.follow(p)
	if s == nil {
		s = r.begin(p)
	}
	if advice != Normal {
		dir := int64(1)
		if advice == ReverseSequential {
			dir = -1
		}
		if s.dir != dir {
			*s = stream{dir: dir, run: 1, behind: dir * p}
		}
		s.window = r.max
	}
	r.last, s.used = s, r.clock
	if s.dir == 0 {
		s.at, s.got, s.end = p, p+1, p+1
		return Window{First: p, N: 1}
	}
	x := s.dir * p
	n := s.window
	if n == r.max { // up to the next extent, then whole ones
		if s.dir > 0 {
			n = (p+n)&^(n-1) - p
		} else {
			n = p&(n-1) + 1
		}
	}
	if s.dir < 0 {
		n = min(n, p+1)
	}
	s.at, s.got, s.end = x, x+n, x+n
	w := Window{First: p, N: n}
	if s.dir < 0 {
		w.First = p - n + 1
	}
	if b := x - keepBehind; advice != Normal && b > s.behind {
		w.BehindFirst, w.BehindN = s.behind, b-s.behind
		if s.dir < 0 {
			w.BehindFirst = -b + 1
		}
		s.behind = b
	}
	return w
}

// Asked says that less than the last Window was asked for: n pages, the faulting one included, for want of frames or because the others were there. The
// stream is then expected to go on from there.
func (r *ReadAhead) Asked(n int64) {
	if s := r.last; s != nil && s.dir != 0 {
		s.got = min(s.at+max(n, 1), s.end)
	}
}

// follow finds the stream that a fault at p continues, and makes its window larger or smaller.
func (r *ReadAhead) follow(p int64) *stream {
	for i := range r.streams {
		s := &r.streams[i]
		x := s.dir * p
		switch {
		case s.window == 0:
		case s.dir == 0 && (p == s.at+1 || p == s.at-1):
			s.dir = p - s.at
			s.at, s.behind = s.dir*s.at, s.dir*s.at
			r.grow(s, s.dir*p)
			return s
		case s.dir == 0 && p == s.at:
			return s
		case s.dir != 0 && s.got <= x && x <= s.end+s.window/4:
			r.grow(s, x)
			return s
		case s.dir != 0 && s.at <= x && x < s.got:
			s.window = max(1, s.window/growth)
			return s
		}
	}
	return nil
}

// grow enlarges the window of a stream that goes on at x.
func (r *ReadAhead) grow(s *stream, x int64) {
	s.run += x - s.at
	if s.window > 1 && s.window >= r.ceiling {
		r.ceiling = min(r.ceiling*growth, r.max)
	}
	s.window = min(s.window*growth, max(r.ceiling, s.run), r.max)
}

// begin makes a stream of one fault, in the place of the one that has been silent longest.
func (r *ReadAhead) begin(p int64) *stream {
	s := &r.streams[0]
	for i := range r.streams {
		if t := &r.streams[i]; t.used < s.used {
			s = t
		}
	}
	if s.window > 1 {
		r.ceiling = max(1, min(r.ceiling, s.window)/growth)
	}
	*s = stream{at: p, window: 1, run: 1, behind: p}
	return s
}
