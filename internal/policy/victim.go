package policy

// What is left to level 0, so that new pages have time to be used, however good the old ones are: 1/newShare of what is resident, and as many units as
// one instruction can need, if they are no more than half.
const (
	newShare = 8
	newUnits = 4
)

// age of a unit divided by the term of its level. The greatest goes first: so all levels turn over all the time, each at its own speed, and nothing
// says how much memory a level gets: as much as there are units that earned it.
func (q *queues) age(u *unit) uint64 {
	k := u.queue()
	if k == coldQueue {
		return 1<<64 - 1
	}
	return uint64(q.clock-u.stamp) * q.term[k].factor
}

// victim is the unit to be evicted next, 0 if there is none.
func (q *queues) victim() uint32 {
	if i := q.queues[coldQueue].head; i != 0 {
		return i
	}
	i, age := q.oldest(&q.queues)
	if i != 0 && age == 0 { // all that is resident was kept since the last Fill: it is the first one's turn again
		q.clock++
		i, _ = q.oldest(&q.queues)
	}
	return i
}

// oldest is the head of greatest age, 0 if there is none. Age 0 is what was kept: others go first, whatever their level.
func (q *queues) oldest(all *[maxQueues]queue) (uint32, uint64) {
	best, bestAge, resident := uint32(0), uint64(0), all[0].frames
	for k := 1; k < q.levels; k++ {
		resident += all[k].frames
		if i := all[k].head; i != 0 {
			if a := q.age(q.table.at(i)); best == 0 || a > bestAge {
				best, bestAge = i, a
			}
		}
	}
	fresh := &all[0]
	few := fresh.frames*newShare <= resident || fresh.units <= newUnits && fresh.frames*2 <= resident
	if fresh.head == 0 || few && bestAge > 0 {
		return best, bestAge
	}
	if a := q.age(q.table.at(fresh.head)); best == 0 || a >= bestAge {
		return fresh.head, a
	}
	return best, bestAge
}

func (q *queues) Victims(want int64, dst []Run) []Run {
	q.lock()
	defer q.mu.Unlock()
	for want > 0 {
		i := q.victim()
		if i == 0 {
			break
		}
		u := q.table.at(i)
		if u.place&touched != 0 && q.secondStay(u) {
			u.place &^= touched
			q.unlink(i)
			q.push(i, u.queue())
			continue
		}
		age := q.age(u) / 2
		r := Run{Object: u.object, First: u.frame(), N: u.frames()}
		q.evict(i)
		for r.N < want {
			j := q.table.covering(r.Object, r.First+r.N)
			if j == 0 || !q.along(j, age) {
				break
			}
			r.N += q.table.at(j).frames()
			q.evict(j)
		}
		for r.N < want && r.First > 0 {
			j := q.table.covering(r.Object, r.First-1)
			if j == 0 || !q.along(j, age) {
				break
			}
			n := q.table.at(j).frames()
			r.First, r.N = r.First-n, r.N+n
			q.evict(j)
		}
		want -= r.N
		q.stats.Victims += r.N
		q.stats.Runs++
		dst = append(dst, r)
	}
	return dst
}

func (q *queues) Next(want int64, dst []Run) []Run {
	q.lock()
	defer q.mu.Unlock()
	ahead := q.queues // the same lists; the heads go on in the copy
	for last, looked := -1, 0; want > 0 && looked < 4*maxHold; looked++ {
		i := ahead[coldQueue].head
		if i == 0 {
			if i, _ = q.oldest(&ahead); i == 0 {
				break
			}
		}
		u := q.table.at(i)
		l, n := &ahead[u.queue()], u.frames()
		l.head, l.frames, l.units = u.next, l.frames-n, l.units-1
		if u.place&touched != 0 && q.secondStay(u) {
			continue
		}
		want -= n
		if last >= 0 && dst[last].Object == u.object && dst[last].First+dst[last].N == u.frame() {
			dst[last].N += n
			continue
		}
		last = len(dst)
		dst = append(dst, Run{Object: u.object, First: u.frame(), N: n})
	}
	return dst
}

// secondStay says whether a unit that was touched may stay once more: only where staying longer has proved worth it.
func (q *queues) secondStay(u *unit) bool {
	k := u.queue()
	return k != coldQueue && q.term[min(k+1, q.levels-1)].gain > 0
}

// along says whether a neighbour of a victim goes along: old enough on its own level to be a victim soon.
func (q *queues) along(i uint32, age uint64) bool {
	u := q.table.at(i)
	return u.queue() == coldQueue || q.age(u) >= age && !(u.place&touched != 0 && q.secondStay(u))
}

// evict takes a victim out and remembers it.
func (q *queues) evict(i uint32) {
	u := q.table.at(i)
	q.unlink(i)
	if k := u.queue(); q.levels > 1 && k != coldQueue {
		q.learn(k)
		q.ghosts.add(q.table.hash(u.object, u.place), k, q.clock)
	}
	q.table.remove(i)
}
