package policy

import (
	"math/bits"
	"math/rand/v2"
	"sync"
)

// queues are FIFO queues of units: one for each level of protection, and one of cold units, which go first. At the head of a queue is the unit that has
// been in it longest. Which head is the victim: victim.go; what level a unit deserves: level.go. With one level it is plain FIFO.
//
// The clock counts frames filled.
type queues struct {
	levels int // immutable
	mu     sync.Mutex

	// All below is guarded by mu.
	table    table
	ghosts   ghosts
	queues   [maxQueues]queue
	clock    uint32 // wraps: only differences count
	capacity int64
	orders   uint // bit i: units of order i were filled once
	term     [maxLevels]term
	stats    Stats
	late     [maxLate]event
	lates    int
}

const (
	maxLevels = 6
	coldQueue = maxLevels
	maxQueues = maxLevels + 1
)

type queue struct {
	head, tail    uint32
	frames, units int64
}

func newQueues(levels int, o Options) *queues {
	if o.Seed == 0 {
		o.Seed = rand.Uint64() | 1
	}
	q := &queues{levels: levels}
	q.table.seed = o.Seed
	q.resize(o.Capacity)
	for k := range q.levels {
		q.setGain(k, 0)
	}
	return q
}

func (q *queues) Resize(capacity int64) {
	q.lock()
	defer q.mu.Unlock()
	q.resize(max(capacity, 1))
}

func (q *queues) resize(capacity int64) {
	q.capacity = capacity
	q.table.resize(capacity)
	if q.levels > 1 {
		q.ghosts.resize(capacity * ghostsPerFrame)
	}
}

func (q *queues) Stats() Stats {
	q.lock()
	defer q.mu.Unlock()
	s := q.stats
	s.Units, s.Cold = q.table.live, q.queues[coldQueue].frames
	s.Resident = s.Cold
	s.Levels = make([]int64, q.levels)
	for i := range s.Levels {
		s.Levels[i] = q.queues[i].frames
		s.Resident += s.Levels[i]
	}
	s.Bytes = q.table.bytes() + q.ghosts.bytes()
	return s
}

// push puts a unit at the end of a queue.
func (q *queues) push(i uint32, to int) {
	u, l := q.table.at(i), &q.queues[to]
	u.setQueue(to)
	u.stamp = q.clock
	u.prev, u.next = l.tail, 0
	if l.tail != 0 {
		q.table.at(l.tail).next = i
	} else {
		l.head = i
	}
	l.tail = i
	l.frames += u.frames()
	l.units++
}

// unlink takes a unit out of its queue.
func (q *queues) unlink(i uint32) {
	u := q.table.at(i)
	l := &q.queues[u.queue()]
	if u.prev != 0 {
		q.table.at(u.prev).next = u.next
	} else {
		l.head = u.next
	}
	if u.next != 0 {
		q.table.at(u.next).prev = u.prev
	} else {
		l.tail = u.prev
	}
	l.frames -= u.frames()
	l.units--
}

// split leaves of a unit the part outside [a, b), as smaller units in its place in the queue. It returns the frames that are gone.
func (q *queues) split(i uint32, a, b int64) int64 {
	u := *q.table.at(i)
	if a <= u.frame() && u.frame()+u.frames() <= b {
		q.unlink(i)
		q.table.remove(i)
		return u.frames()
	}
	if b <= u.frame() || u.frame()+u.frames() <= a {
		return 0
	}
	// Two halves, where the unit was.
	order := u.order() - 1
	lo := q.table.insert(u.object, u.frame(), order)
	hi := q.table.insert(u.object, u.frame()+1<<order, order)
	for _, j := range [2]uint32{hi, lo} {
		v, w := q.table.at(j), q.table.at(i)
		v.place |= u.place & 0xff
		v.stamp = u.stamp
		v.prev, v.next = i, w.next
		if w.next != 0 {
			q.table.at(w.next).prev = j
		} else {
			q.queues[u.queue()].tail = j
		}
		w.next = j
		q.queues[u.queue()].frames += v.frames()
		q.queues[u.queue()].units++
	}
	q.unlink(i)
	q.table.remove(i)
	return q.split(lo, a, b) + q.split(hi, a, b)
}

// forget takes [a, b) out and returns the frames that were resident.
func (q *queues) forget(object uint64, a, b int64) int64 {
	n := int64(0)
	for a < b && q.table.orders != 0 {
		i := q.table.covering(object, a)
		if i == 0 {
			least := uint(bits.TrailingZeros(q.table.orders))
			a = (a>>least + 1) << least
			continue
		}
		u := q.table.at(i)
		end := u.frame() + u.frames()
		n += q.split(i, a, b)
		a = end
	}
	return n
}
