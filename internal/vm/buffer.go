package vm

import (
	"context"
	"errors"
	"sync"
)

// bufferPool lends buffers of one extent for data returns: off the heap, recycled, and no more of them than the limit. Getting one may wait.
//
// An object gets one only while it has fewer than are left. So one whose manager keeps what it is lent has half of them at most, two such objects three quarters, and
// for others there are some left.
type bufferPool struct {
	size int // immutable

	mu   sync.Mutex
	left int           // guarded by mu; how many may be lent
	more chan struct{} // guarded by mu; closed when one comes back; nil: nobody waits
	free [][]byte      // guarded by mu
}

// loan is how many buffers one object has.
type loan struct {
	n int // guarded by bufferPool.mu
}

func newBufferPool(limit int64) *bufferPool {
	return &bufferPool{size: extentSize, left: int(max(2, limit/extentSize))}
}

var errNoBuffer = errors.New("all return buffers are lent")

// get lends a buffer. It waits for one until ctx ends.
func (p *bufferPool) get(ctx context.Context, to *loan) ([]byte, error) {
	for {
		p.mu.Lock()
		if to.n < p.left {
			defer p.mu.Unlock()
			return p.lend(to)
		}
		if p.more == nil {
			p.more = make(chan struct{})
		}
		more := p.more
		p.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// tryGet is get for who may not wait.
func (p *bufferPool) tryGet(to *loan) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if to.n >= p.left {
		return nil, errNoBuffer
	}
	return p.lend(to)
}

// lend is called with mu.
func (p *bufferPool) lend(to *loan) (b []byte, err error) {
	if n := len(p.free); n > 0 {
		b = p.free[n-1]
		p.free = p.free[:n-1]
	} else if b, err = offHeap(p.size); err != nil {
		return nil, err
	}
	p.left--
	to.n++
	return b, nil
}

func (p *bufferPool) put(b []byte, from *loan) {
	if b == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = append(p.free, b[:p.size])
	p.left++
	from.n--
	if p.more != nil {
		close(p.more)
		p.more = nil
	}
}

func (p *bufferPool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.free {
		unmapOffHeap(b)
	}
	p.free = nil
}
