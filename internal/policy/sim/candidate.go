package sim

import "machpager/internal/policy"

// Ghosted are policies of two FIFO queues and a list of what was evicted from the first, as published but for what they learn from hits, which nobody sees.
// One frame is filled or evicted at a time.
type Ghosted struct {
	small, main, ghost fifo
	smallLimit         int64 // frames that the first queue may have before it gives
	ghostLimit         int64
	remember           bool // what leaves the main queue is remembered too
}

// TwoQ is 2Q (Johnson and Shasha 1994): a quarter for what is new, ghosts for half the capacity, and a main queue, in FIFO order here, for what came back.
func TwoQ(capacity int64) *Ghosted {
	return &Ghosted{smallLimit: max(1, capacity/4), ghostLimit: max(1, capacity/2)}
}

// S3FIFO is S3-FIFO (Yang and others 2023): a tenth for what is new, ghosts for the capacity. What leaves its main queue without a known hit is remembered too: otherwise it
// would have to fail twice.
func S3FIFO(capacity int64) *Ghosted {
	return &Ghosted{smallLimit: max(1, capacity/10), ghostLimit: capacity, remember: true}
}

// Fill puts what came back soon into the main queue.
func (g *Ghosted) Fill(r policy.Run, _, _ int64) {
	if g.ghost.remove(r.First) {
		g.main.push(r.First)
	} else {
		g.small.push(r.First)
	}
}

// Touch is ignored.
func (g *Ghosted) Touch(uint64, int64) {}

// Victims chooses one frame.
func (g *Ghosted) Victims(_ int64, dst []policy.Run) []policy.Run {
	var f int64
	if g.small.len() >= g.smallLimit || g.main.len() == 0 {
		f = g.small.pop()
		g.ghost.push(f)
	} else if f = g.main.pop(); g.remember {
		g.ghost.push(f)
	}
	for g.ghost.len() > g.ghostLimit {
		g.ghost.pop()
	}
	return append(dst, policy.Run{Object: 1, First: f, N: 1})
}

// fifo is a queue from which anything can be removed.
type fifo struct {
	order []entry
	turn  map[int64]int64 // of what is in it
	next  int64
}

type entry struct{ frame, turn int64 }

func (q *fifo) len() int64 { return int64(len(q.turn)) }

func (q *fifo) push(f int64) {
	if q.turn == nil {
		q.turn = map[int64]int64{}
	}
	q.next++
	q.order = append(q.order, entry{f, q.next})
	q.turn[f] = q.next
}

func (q *fifo) remove(f int64) bool {
	_, ok := q.turn[f]
	delete(q.turn, f)
	return ok
}

func (q *fifo) pop() int64 {
	for {
		e := q.order[0]
		q.order = q.order[1:]
		if q.turn[e.frame] == e.turn {
			delete(q.turn, e.frame)
			return e.frame
		}
	}
}
