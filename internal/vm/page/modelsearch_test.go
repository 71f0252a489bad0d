package page

import (
	"fmt"
	"strings"
	"time"
)

// finding is what a search ends with.
type finding struct {
	states, steps int
	depth         int  // steps from the start to the farthest state
	complete      bool // no state is left that was not looked at; false: the bound was reached
	visited       [numPCs]bool
	bad           string
	trace         []string // the shortest way there, if bad
	took          time.Duration
}

func (f *finding) String() string {
	s := "complete"
	switch {
	case f.bad != "":
		s = "ended at the first fault"
	case !f.complete:
		s = "bound reached"
	}
	return fmt.Sprintf("%d states, %d steps, depth %d, %v, %s", f.states, f.steps, f.depth, f.took.Round(time.Millisecond), s)
}

// search explores breadth-first from a page that the manager has and nobody has touched, so the first fault it finds has a shortest trace.
//
// Safety: no thread reads anything but what was last written; no owner's event is refused; invariant holds in every state (if it is not nil).
// Progress, if nothing bad was found and the search is complete: from every state each thread can finish its access by steps that must happen: those of
// workers that have begun, of readers with messages, of adoption, and of threads that were woken. New accesses, page-outs, signals and crashes do not help.
//
// What is wrong in another way than want is passed over; "" wants everything.
func search(c config, invariant func(*state) string, want string) *finding {
	begin := time.Now()
	m := &model{config: c}
	first := state{store: cur}
	index := map[state]int32{first: 0}
	states, parent := []state{first}, []int32{-1}
	var musts edges
	f := &finding{complete: true}
	levelEnd := 1
	done := func() *finding { f.states, f.took = len(states), time.Since(begin); return f }
	for i := 0; i < len(states); i++ {
		if i == levelEnd {
			f.depth, levelEnd = f.depth+1, len(states)
		}
		for _, st := range m.all(&states[i]) {
			f.steps++
			bad := st.bad
			if bad == "" && invariant != nil {
				bad = invariant(&st.to)
			}
			if bad != "" && !strings.Contains(bad, want) {
				continue
			}
			if bad != "" {
				f.bad, f.complete = bad, false
				f.trace = append(m.trace(states, parent, int32(i)), line(st.who, st.what, &st.to))
				return done()
			}
			j, seen := index[st.to]
			if !seen {
				if c.limit > 0 && len(states) >= c.limit {
					f.complete = false
					continue
				}
				j = int32(len(states))
				index[st.to] = j
				states, parent = append(states, st.to), append(parent, int32(i))
				for _, w := range st.to.workers {
					f.visited[w.pc] = true
				}
			}
			if st.must {
				musts.add(int32(i), j)
			}
		}
	}
	if !f.complete {
		return done()
	}
	for t := range tasks {
		stuck := musts.cannotReach(len(states), func(i int32) bool { return states[i].threads[t].phase == running })
		if stuck >= 0 {
			f.bad = fmt.Sprintf("%s waits for ever", taskNames[t])
			f.trace = m.trace(states, parent, stuck)
			break
		}
	}
	return done()
}

// trace is the way to state i.
func (m *model) trace(states []state, parent []int32, i int32) []string {
	if parent[i] < 0 {
		return []string{line("", "(begin)", &states[i])}
	}
	lines := m.trace(states, parent, parent[i])
	for _, st := range m.all(&states[parent[i]]) {
		if st.to == states[i] {
			return append(lines, line(st.who, st.what, &st.to))
		}
	}
	panic("BUG: a step that cannot be repeated")
}

func line(who, what string, s *state) string {
	return fmt.Sprintf("%-10s %-46s %v", who, what, s)
}

func (f *finding) report() string {
	return fmt.Sprintf("%s after %d steps:\n\t%s\n\t=> %s", f.bad, len(f.trace)-1, strings.Join(f.trace, "\n\t"), f.bad)
}

// edges are steps that must happen, from state to state.
type edges struct{ from, to []int32 }

func (e *edges) add(from, to int32) { e.from, e.to = append(e.from, from), append(e.to, to) }

// cannotReach returns the first of n states from which no path of edges leads to a goal, or -1.
func (e *edges) cannotReach(n int, goal func(int32) bool) int32 {
	// Predecessors of each state, in one slice.
	start := make([]int32, n+1)
	for _, to := range e.to {
		start[to+1]++
	}
	for i := range n {
		start[i+1] += start[i]
	}
	preds, fill := make([]int32, len(e.to)), append([]int32(nil), start[:n]...)
	for k, to := range e.to {
		preds[fill[to]] = e.from[k]
		fill[to]++
	}
	reached, queue := make([]bool, n), make([]int32, 0, n)
	for i := range int32(n) {
		if goal(i) {
			reached[i] = true
			queue = append(queue, i)
		}
	}
	for len(queue) > 0 {
		i := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		for _, p := range preds[start[i]:start[i+1]] {
			if !reached[p] {
				reached[p] = true
				queue = append(queue, p)
			}
		}
	}
	for i := range int32(n) {
		if !reached[i] {
			return i
		}
	}
	return -1
}
