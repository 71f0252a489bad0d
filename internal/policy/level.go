package policy

import "math"

const (
	ghostsPerFrame = 4
	demoteAfter    = 4    // capacities: who comes back later was not worth its level
	maxGain        = 12   // a level's units stay at most 8 times as long as those of the level below
	sample         = 32   // evictions from a level, between decisions
	worth          = 3    // times as many units as of level 0 must come back for a longer term
	memory         = 4096 // evictions from level 0 that its rate of return is taken from
)

// term is how long units stay at a level, and what is known of those that had to leave it.
type term struct {
	gain              int    // the term is 2^(gain*level/4) times that of level 0; 0 to maxGain
	factor            uint64 // 1<<24 divided by that
	evicted, returned int64  // units lately; returned within one capacity
}

func (q *queues) setGain(k, gain int) {
	t := &q.term[k]
	t.gain = max(0, min(gain, maxGain))
	t.factor = uint64(math.Exp2(24 - float64(k*t.gain)/4))
}

// level is where a unit begins that was evicted from level l when age frames fewer had been filled. If nobody waited for it, nothing was learned.
func (q *queues) level(l int, age int64, waited bool) int {
	if !waited {
		return l
	}
	q.stats.Refaults++
	switch {
	case age <= q.capacity:
		q.term[l].returned++
		if l+1 < q.levels {
			q.stats.Promotions++
			return l + 1
		}
	case age > demoteAfter*q.capacity && l > 0:
		q.stats.Demotions++
		return l - 1
	}
	return l
}

// learn counts an eviction from level k and sets the term of the level: longer, if those who leave it come back much more often than those who leave level 0;
// shorter, if not. All begin equal, as FIFO: protection must prove itself first.
func (q *queues) learn(k int) {
	t, base := &q.term[k], &q.term[0]
	t.evicted++
	if k == 0 {
		if t.evicted > min(2*q.capacity, memory) {
			t.evicted, t.returned = t.evicted/2, t.returned/2
		}
		return
	}
	if t.evicted < sample || base.evicted < sample/2 {
		return
	}
	// t.returned/t.evicted against base.returned/base.evicted
	switch is, of := t.returned*base.evicted, base.returned*t.evicted; {
	case is > worth*of:
		q.setGain(k, t.gain+1)
	case is < (1+worth)*of/2:
		q.setGain(k, t.gain-2)
	}
	t.evicted, t.returned = t.evicted/2, t.returned/2
}
