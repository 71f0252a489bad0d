package policy

import "math/bits"

func orderOf(n int64) uint { return uint(bits.Len64(uint64(n)) - 1) }

// event is a Fill, or a Touch, whose unit is 0.
type event struct {
	run        Run
	unit, need int64
}

// maxLate is how many events are put off: few enough that the fault that pays for them is not noticed.
const maxLate = 16

// Fills and touches come from faults, one at a time, each on a processor that knows nothing of the tables any more. They are put off, and done together when there are some, or
// before anything that depends on them: nobody can see that they were late.
func (q *queues) later(e event) {
	q.mu.Lock()
	q.late[q.lates] = e
	if q.lates++; q.lates == maxLate {
		q.catchUp()
	}
	q.mu.Unlock()
}

// lock takes the mutex, for all but what is put off.
func (q *queues) lock() {
	q.mu.Lock()
	q.catchUp()
}

// catchUp does what was put off. Called with mu.
func (q *queues) catchUp() {
	for i := range q.late[:q.lates] {
		if e := &q.late[i]; e.unit != 0 {
			q.fill(e.run, e.unit, e.need)
		} else {
			q.touch(e.run.Object, e.run.First)
		}
	}
	q.lates = 0
}

func (q *queues) Fill(r Run, unit, need int64) { q.later(event{r, unit, need}) }

func (q *queues) fill(r Run, unit, need int64) {
	q.forget(r.Object, r.First, r.First+r.N)
	order := orderOf(unit)
	q.orders |= 1 << order
	for f := r.First; f < r.First+r.N; f += unit {
		level := 0
		if q.levels > 1 {
			waited := f <= need && need < f+unit
			if l, age, ok := q.remembered(r.Object, f, need, order, waited); ok {
				level = q.level(l, int64(age), waited)
			}
		}
		q.push(q.table.insert(r.Object, f, order), level)
	}
	q.clock += uint32(r.N) // afterwards: what was filled is older than what was kept
	q.stats.Filled += r.N
}

// remembered looks for a unit among the ghosts. If a thread waited, it may have been evicted as a part or as parts of this unit: the needed frame counts.
func (q *queues) remembered(object uint64, frame, need int64, order uint, waited bool) (level int, age uint32, ok bool) {
	level, age, ok = q.ghosts.find(q.table.hash(object, placeOf(frame, order)), q.clock)
	if ok || !waited {
		return level, age, ok
	}
	for m := q.orders &^ (1 << order); m != 0 && !ok; m &= m - 1 {
		o := uint(bits.TrailingZeros(m))
		level, age, ok = q.ghosts.find(q.table.hash(object, placeOf(need>>o<<o, o)), q.clock)
	}
	return level, age, ok
}

func (q *queues) Touch(object uint64, frame int64) {
	q.later(event{run: Run{Object: object, First: frame}})
}

func (q *queues) touch(object uint64, frame int64) {
	i := q.table.covering(object, frame)
	if i == 0 {
		return
	}
	q.stats.Touched++
	u := q.table.at(i)
	// The first write just behind the fill says nothing new.
	if q.levels > 1 && int64(q.clock-u.stamp) > q.capacity/16 {
		u.place |= touched
	}
}

func (q *queues) Keep(r Run, unit int64) {
	q.lock()
	defer q.mu.Unlock()
	q.forget(r.Object, r.First, r.First+r.N)
	order := orderOf(unit)
	for f := r.First; f < r.First+r.N; f += unit {
		level := 0
		if q.levels > 1 {
			level, _, _ = q.remembered(r.Object, f, f, order, true)
			if t := &q.term[level]; t.evicted > 0 {
				t.evicted--
			}
		}
		q.push(q.table.insert(r.Object, f, order), level)
	}
	q.stats.Kept += r.N
}

func (q *queues) Cold(r Run) {
	q.each(r, func(i uint32, u *unit) {
		if r.First <= u.frame() && u.frame()+u.frames() <= r.First+r.N && u.queue() != coldQueue {
			q.unlink(i)
			u.place &^= touched
			q.push(i, coldQueue)
		}
	})
}

func (q *queues) Forget(r Run) {
	q.each(r, func(i uint32, u *unit) { q.stats.Forgotten += q.split(i, r.First, r.First+r.N) })
}

// maxHold is how many units are looked at before the mutex is given up for a moment.
const maxHold = 1024

// each calls fn for the units that have frames in r. If r is longer than all that is resident, those are looked at instead.
func (q *queues) each(r Run, fn func(i uint32, u *unit)) {
	q.lock()
	defer q.mu.Unlock()
	pause := func() {
		q.mu.Unlock()
		q.lock()
	}
	end := r.First + r.N
	if r.N > int64(q.table.used) {
		for i := uint32(1); i < q.table.used; i++ {
			if u := q.table.at(i); u.place&inUse != 0 && u.object == r.Object && u.frame() < end && u.frame()+u.frames() > r.First {
				fn(i, u)
			}
			if i%maxHold == 0 {
				pause()
			}
		}
		return
	}
	for n, f := 1, r.First; f < end && q.table.orders != 0; n++ {
		if i := q.table.covering(r.Object, f); i != 0 {
			u := q.table.at(i)
			f = u.frame() + u.frames()
			fn(i, u)
		} else {
			least := uint(bits.TrailingZeros(q.table.orders))
			f = (f>>least + 1) << least
		}
		if n%maxHold == 0 {
			pause()
		}
	}
}
