package indirect

import (
	"context"
	"fmt"
	"time"

	"machpager/pager/store"
)

var _ store.Checker = (*Store)(nil)

const (
	checkTries = 40
	checkPause = 5 * time.Millisecond
	checkSame  = 5 // a count is wrong when it was by the same amount so often in a row
)

// Check holds the words against each other and against what the parts have in use: no place is named by two words, and each part has as many slots in use as words name.
// Nothing moves meanwhile. Parts that are checkers are checked too.
func (s *Store) Check(ctx context.Context, problem func(what string)) (compared bool, err error) {
	s.moveMu.Lock()
	defer s.moveMu.Unlock()
	if !s.begin() {
		return true, fmt.Errorf("check: %w", store.ErrClosed)
	}
	defer s.end()
	s.checkPlaces(problem)
	if compared, err = s.checkUsed(ctx, problem); err != nil {
		return compared, err
	}
	for id := range s.parts {
		p := s.parts[id].Load()
		if p == nil {
			continue
		}
		if c, ok := p.Store.(store.Checker); ok {
			also, err := c.Check(ctx, func(what string) { problem(fmt.Sprintf("part %d: %s", id, what)) })
			if err != nil {
				return false, err
			}
			compared = compared && also
		}
	}
	return compared, nil
}

// checkPlaces looks for places that two words name, or that are in no part.
func (s *Store) checkPlaces(problem func(what string)) {
	const groupSlots = 64 * 64
	type at struct {
		part  uint8
		group store.Slot
	}
	seen := map[at]*[groupSlots / 64]uint64{}
	var twice []int // by slot less one
	s.each(func(i int, w word) {
		if w.part() == 0 || w.part() == uint8(lost) {
			return
		}
		if s.parts[w.part()].Load() == nil {
			if word(s.word(store.Slot(i+1)).Load()).part() == w.part() {
				problem(fmt.Sprintf("slot %d is in part %d, which is not there", i+1, w.part()))
			}
			return
		}
		k := at{w.part(), w.slot() / groupSlots}
		g := seen[k]
		if g == nil {
			g = new([groupSlots / 64]uint64)
			seen[k] = g
		}
		bit := uint64(1) << (w.slot() % 64)
		if g[w.slot()%groupSlots/64]&bit != 0 {
			twice = append(twice, i)
		}
		g[w.slot()%groupSlots/64] |= bit
	})
	if len(twice) == 0 {
		return
	}
	// A place may have gone from one slot to another while the words were read.
	wanted := map[word]int{}
	for _, i := range twice {
		if w := word(s.word(store.Slot(i+1)).Load()) &^ (touched | moving); w.part() != 0 && w != lost {
			wanted[w] = i
		}
	}
	s.each(func(i int, w word) {
		j, ok := wanted[w&^(touched|moving)]
		if !ok || i == j {
			return
		}
		for range 2 { // each of them, and still
			if word(s.word(store.Slot(i+1)).Load())&^(touched|moving) != w&^(touched|moving) || word(s.word(store.Slot(j+1)).Load())&^(touched|moving) != w&^(touched|moving) {
				return
			}
		}
		problem(fmt.Sprintf("slots %d and %d are in one place, slot %d of part %d", j+1, i+1, w.slot(), w.part()))
	})
}

// checkUsed compares what the parts have in use with the words, in a moment in which nothing is under way.
func (s *Store) checkUsed(ctx context.Context, problem func(what string)) (compared bool, err error) {
	var last [maxParts + 2]int64
	same := 0
	for range checkTries {
		diff, quiet := s.unnamed()
		switch {
		case !quiet:
			same = 0
		case diff == [maxParts + 2]int64{}:
			return true, nil
		case same > 0 && diff == last:
			same++
		default:
			last, same = diff, 1
		}
		if same == checkSame {
			for id, n := range diff {
				if n > 0 {
					problem(fmt.Sprintf("part %d has %d slots in use that no slot of the store is in", id, n))
				} else if n < 0 {
					problem(fmt.Sprintf("part %d has %d slots in use fewer than slots of the store are in", id, -n))
				}
			}
			return true, nil
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(checkPause):
		}
	}
	return false, nil
}

// unnamed is how many slots of each part are in use beyond those that words name. quiet: nothing but this was under way.
func (s *Store) unnamed() (diff [maxParts + 2]int64, quiet bool) {
	const alone = 1 // Check's own
	before := [2]int64{s.state.Load(), int64(s.turn.Load())}
	for id := range s.parts {
		if p := s.parts[id].Load(); p != nil {
			diff[id] = p.used.Load()
		}
	}
	s.each(func(_ int, w word) {
		if id := w.part(); id != 0 && id != uint8(lost) && s.parts[id].Load() != nil {
			diff[id]--
		}
	})
	return diff, before[0] == alone && before == [2]int64{s.state.Load(), int64(s.turn.Load())}
}
