package vm

import (
	"sync"
	"sync/atomic"
)

// stuckFrames are frames that a punch left in the file because somebody held their folio. They lie under Absent pages, reserved as before, because they are charged. What a
// task has put there by its own hand looks the same and was never reserved, so it is known of which pages they are.
type stuckFrames struct {
	n  atomic.Int64 // the sum
	mu sync.Mutex   // a leaf
	at map[int64]int64
}

// Load is how many there are.
func (s *stuckFrames) Load() int64 { return s.n.Load() }

// strand notes what lies in the file of the pages [a, b), which the caller owns and has punched. It returns the frames.
func (o *Object) strand(a, b int64) (all int64) {
	s := &o.stuck
	for p := a; p < b; p++ {
		left, err := o.file.Occupied(p<<o.shift, o.pageSize)
		if err != nil || left == 0 {
			continue
		}
		f := left / frameSize
		s.mu.Lock()
		if s.at == nil {
			s.at = map[int64]int64{}
		}
		f -= s.at[p] // punched in vain once more
		s.at[p] += f
		s.mu.Unlock()
		s.n.Add(f)
		all += f
	}
	return all
}

// unstick releases up to most frames that are stuck in each of the pages [a, b): they are gone, or accounted for as the page's own now. The caller owns the pages.
func (o *Object) unstick(a, b, most int64) (all int64) {
	s := &o.stuck
	if s.n.Load() == 0 {
		return 0
	}
	s.mu.Lock()
	for p := a; p < b; p++ {
		if f := min(s.at[p], most); f > 0 {
			if s.at[p] -= f; s.at[p] == 0 {
				delete(s.at, p)
			}
			all += f
		}
	}
	s.mu.Unlock()
	if all > 0 {
		s.n.Add(-all)
		o.releaseFrames(all)
	}
	return all
}

// punchAbsent takes out of the file what lies there of the pages [a, b), which were Absent and are the caller's as Evicting. It returns the frames freed.
func (o *Object) punchAbsent(a, b int64) (freed int64, err error) {
	before, err := o.file.Occupied(a<<o.shift, (b-a)<<o.shift)
	if err != nil || before == 0 && o.stuck.Load() == 0 {
		return 0, err
	}
	left, err := o.file.Punch(a<<o.shift, (b-a)<<o.shift)
	if err != nil {
		return 0, err
	}
	if left == 0 {
		o.unstick(a, b, int64(o.framesOf(1)))
		return before / frameSize, nil
	}
	for p := a; p < b; p++ {
		in, err := o.file.Occupied(p<<o.shift, o.pageSize)
		if err != nil {
			return 0, err
		}
		o.stuck.mu.Lock()
		gone := o.stuck.at[p] - in/frameSize
		o.stuck.mu.Unlock()
		o.unstick(p, p+1, gone)
	}
	return max(0, before-left) / frameSize, nil
}
