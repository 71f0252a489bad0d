package vm

import (
	"context"
	"sync"
	"sync/atomic"
)

// gate counts who is inside something that may be closed. Entering costs one atomic addition.
type gate struct {
	n       atomic.Int64 // users, plus gateClosed once close was called
	once    sync.Once
	closing chan struct{} // closed when close is called
	done    chan struct{} // closed when the gate is closed and nobody is inside
}

const gateClosed = 1 << 40

func newGate() *gate { return &gate{closing: make(chan struct{}), done: make(chan struct{})} }

// enter reports whether the gate is open; if so the caller is inside until leave.
func (g *gate) enter() bool {
	if g.n.Add(1) < gateClosed {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() {
	if g.n.Add(-1) == gateClosed {
		g.once.Do(func() { close(g.done) })
	}
}

// close shuts the gate and waits until nobody is inside. It reports whether this call was the first; all calls wait. Never from inside.
func (g *gate) close() bool {
	for {
		n := g.n.Load()
		if n >= gateClosed {
			<-g.done
			return false
		}
		if g.n.CompareAndSwap(n, n+gateClosed+1) { // one for ourselves: leave does the rest
			close(g.closing)
			g.leave()
			<-g.done
			return true
		}
	}
}

// bound is a context for waits inside: it ends with reason when the gate is being closed, for who closes it waits for those inside.
func (g *gate) bound(ctx context.Context, reason error) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-g.closing:
			cancel(reason)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// open reports whether nobody has begun to close the gate.
func (g *gate) open() bool { return g.n.Load() < gateClosed }
