//go:build linux

package region

import "sync"

// gate lets users in until it is shut, and tells when the last one has left. Unlike a read lock it may be entered again by who is inside.
type gate struct {
	mu    sync.Mutex
	users int           // guarded by mu
	empty chan struct{} // guarded by mu; made by shut, closed when users is 0
}

// enter keeps the gate from being empty until leave; false when it is shut.
func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.empty != nil {
		return false
	}
	g.users++
	return true
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.users--; g.users == 0 && g.empty != nil {
		close(g.empty)
	}
}

// shut lets nobody in any more. The channel is closed when everybody has left. Once only.
func (g *gate) shut() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.empty = make(chan struct{})
	if g.users == 0 {
		close(g.empty)
	}
	return g.empty
}
