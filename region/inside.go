//go:build linux

package region

import (
	"container/list"
	"sync"
)

// guards knows which Guards are being run. A goroutine inside one may be waiting in a fault, or be on its way from the signal to the look at the address,
// while its Region is closed: until every Guard that began before has ended, the addresses must not become somebody else's.
type guards struct {
	mu     sync.Mutex
	clock  uint64    // guarded by mu; counts Guards
	active list.List // guarded by mu; the clock at their beginning, oldest first
	closed []closed  // guarded by mu; what waits for Guards, oldest first
}

// closed is a Region that was closed while Guards were being run.
type closed struct {
	clock   uint64 // the last Guard it waits for
	release func()
}

// closedMax bounds how many Regions wait for Guards: one that never ends must not use up all mappings a process may have.
const closedMax = 1024

var inside guards

func (g *guards) begin() *list.Element {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.clock++
	return g.active.PushBack(g.clock)
}

func (g *guards) end(e *list.Element) {
	g.mu.Lock()
	g.active.Remove(e)
	n := 0
	for n < len(g.closed) && (g.active.Len() == 0 || g.closed[n].clock < g.active.Front().Value.(uint64)) {
		n++
	}
	due := g.take(n)
	g.mu.Unlock()
	for _, c := range due {
		c.release()
	}
}

// after calls release when the Guards that are being run have ended; at once if there are none.
func (g *guards) after(release func()) {
	g.mu.Lock()
	g.closed = append(g.closed, closed{g.clock, release})
	n := max(len(g.closed)-closedMax, 0)
	if g.active.Len() == 0 {
		n = len(g.closed)
	}
	due := g.take(n)
	g.mu.Unlock()
	for _, c := range due {
		c.release()
	}
}

// take removes the first n of closed. The caller holds mu.
func (g *guards) take(n int) []closed {
	due := append([]closed(nil), g.closed[:n]...)
	g.closed = append(g.closed[:0], g.closed[n:]...)
	clear(g.closed[len(g.closed):cap(g.closed)])
	return due
}
