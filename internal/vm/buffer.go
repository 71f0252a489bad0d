package vm

import (
	"context"
	"errors"
	"sync"
	"time"
)

// shortReturn is the size of a short buffer, in bytes. Dirty victims are few in a row: were an extent lent for each, a store that takes its time would leave nothing to
// return the next ones in.
const shortReturn = 64 << 10

// bufferPool lends buffers for data returns: off the heap, recycled, and no more bytes of them than the limit. They are short or as large as an extent. Getting one may wait.
//
// An object gets one only while it has less than is left. So one whose manager keeps what it is lent has half of all at most, two such objects three quarters, and
// for others there is something left.
type bufferPool struct {
	size  int // immutable; of the large ones
	limit int // immutable; bytes

	mu     sync.Mutex
	left   int           // guarded by mu; bytes that may be lent; below 0: so many were lent beyond the limit
	mapped int           // guarded by mu; bytes of all there are, lent or free
	more   chan struct{} // guarded by mu; closed when one comes back; nil: nobody waits
	short  [][]byte      // guarded by mu; free
	large  [][]byte      // guarded by mu; free
}

// loan is how many bytes of buffers one object has.
type loan struct {
	n int // guarded by bufferPool.mu
}

func newBufferPool(limit int64) *bufferPool {
	n := int(max(2, limit/extentSize)) * extentSize
	return &bufferPool{size: extentSize, limit: n, left: n}
}

var errNoBuffer = errors.New("all return buffers are lent")

// get lends a buffer for n bytes, at most size. It waits for one until ctx ends.
func (p *bufferPool) get(ctx context.Context, n int, to *loan) ([]byte, error) {
	for {
		p.mu.Lock()
		if p.may(n, to) {
			defer p.mu.Unlock()
			return p.lend(n, to)
		}
		if p.more == nil {
			p.more = make(chan struct{})
		}
		more := p.more
		p.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// getAnyway lends a large buffer to an object that ends, whose contents must not depend on what the managers of others leave undone: if none has come back after wait, and
// the object has none, it gets one beyond the limit.
func (p *bufferPool) getAnyway(ctx context.Context, wait time.Duration, to *loan) ([]byte, error) {
	short, cancel := context.WithTimeout(ctx, wait)
	b, err := p.get(short, p.size, to)
	cancel()
	if err == nil || ctx.Err() != nil {
		return b, err
	}
	p.mu.Lock()
	if to.n == 0 {
		defer p.mu.Unlock()
		return p.lend(p.size, to)
	}
	p.mu.Unlock()
	return p.get(ctx, p.size, to)
}

// tryGet is get for who may not wait.
func (p *bufferPool) tryGet(n int, to *loan) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.may(n, to) {
		return nil, errNoBuffer
	}
	return p.lend(n, to)
}

// most is how many bytes tryGet would lend now.
func (p *bufferPool) most(to *loan) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.may(p.size, to):
		return p.size
	case p.may(shortReturn, to):
		return shortReturn
	}
	return 0
}

func (p *bufferPool) sizeFor(n int) int {
	if n <= shortReturn {
		return shortReturn
	}
	return p.size
}

// may is called with mu.
func (p *bufferPool) may(n int, to *loan) bool { return to.n < p.left && p.sizeFor(n) <= p.left }

// lend is called with mu.
func (p *bufferPool) lend(n int, to *loan) (b []byte, err error) {
	size, free := shortReturn, &p.short
	if n > shortReturn {
		size, free = p.size, &p.large
	}
	if k := len(*free); k > 0 {
		b = (*free)[k-1]
		*free = (*free)[:k-1]
	} else {
		p.shrink(p.limit - size)
		if b, err = offHeap(size); err != nil {
			return nil, err
		}
		p.mapped += size
	}
	p.left -= size
	to.n += size
	return b, nil
}

// shrink unmaps free buffers until there are no more than so many bytes. Called with mu.
func (p *bufferPool) shrink(bytes int) {
	for _, free := range []*[][]byte{&p.short, &p.large} {
		for p.mapped > bytes && len(*free) > 0 {
			k := len(*free) - 1
			b := (*free)[k]
			p.mapped -= len(b)
			unmapOffHeap(b)
			*free = (*free)[:k]
		}
	}
}

// put takes back what get has lent.
func (p *bufferPool) put(b []byte, from *loan) {
	if b == nil {
		return
	}
	b = b[:cap(b)]
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(b) == shortReturn {
		p.short = append(p.short, b)
	} else {
		p.large = append(p.large, b)
	}
	p.left += len(b)
	from.n -= len(b)
	if p.more != nil {
		close(p.more)
		p.more = nil
	}
}

func (p *bufferPool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shrink(0)
}
