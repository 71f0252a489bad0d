package vnode

import (
	"math"
	"sync/atomic"

	"machpager/pager/emm"
)

// attachment is a vm's use of the object, from Init to Terminate.
type attachment struct {
	p        *Pager      // immutable
	pageSize int64       // immutable
	ended    atomic.Bool // nothing is answered any more but returns
}

// Init attaches a vm. One at a time: emm.Failure for a second; emm.InvalidObject after Close.
func (p *Pager) Init(h emm.Head, pageSize int) emm.KernReturn {
	if h.Control == nil || pageSize <= 0 || pageSize > maxCluster || pageSize&(pageSize-1) != 0 {
		return emm.InvalidArgument
	}
	a := &attachment{p: p, pageSize: int64(pageSize)}
	p.mu.Lock()
	switch {
	case p.closed:
		p.mu.Unlock()
		return emm.InvalidObject
	case p.now != nil:
		p.mu.Unlock()
		return emm.Failure
	}
	p.now = a
	p.mu.Unlock()
	h.Control.SetCookie(a)
	kr := h.Control.ChangeAttributes(emm.Attributes{ClusterSize: maxCluster}, false)
	if kr != emm.Success {
		p.Terminate(h)
	}
	return kr
}

// Terminate ends the vm's use. Reads that were not begun are dropped; what was returned is still written.
func (p *Pager) Terminate(h emm.Head) emm.KernReturn {
	a := p.attached(h.Control)
	if a == nil {
		return emm.InvalidArgument
	}
	a.ended.Store(true)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now != a {
		return emm.InvalidArgument
	}
	p.now = nil
	p.urgent, p.ahead, p.syncs = nil, nil, nil
	return emm.Success
}

// attached is what Init left with the control, or nil.
func (p *Pager) attached(c emm.Control) *attachment {
	if c == nil {
		return nil
	}
	if a, ok := c.Cookie().(*attachment); ok && a.p == p {
		return a
	}
	return nil
}

// message checks what every message about a range begins with: nil for a foreign control, and for a range that is no number of whole pages.
func (p *Pager) message(h emm.Head, r emm.Run) *attachment {
	a := p.attached(h.Control)
	if a == nil || r.Off < 0 || r.Size <= 0 || r.Off > math.MaxInt64-r.Size || (r.Off|r.Size)&(a.pageSize-1) != 0 {
		return nil
	}
	return a
}

// end is where the object's pages end.
func (a *attachment) end() int64 {
	n := a.p.contents.limit()
	if n > math.MaxInt64-a.pageSize {
		return n &^ (a.pageSize - 1)
	}
	return (n + a.pageSize - 1) &^ (a.pageSize - 1)
}

// DataRequest has the pages read.
func (p *Pager) DataRequest(h emm.Head, want emm.Run, need int64, _ emm.Prot) emm.KernReturn {
	a := p.message(h, want)
	if a == nil {
		return emm.InvalidArgument
	}
	if need >= 0 && (need < want.Off || need >= want.End()) {
		need = -1
	}
	t := task{kind: reading, a: a, control: h.Control, run: want, need: need}
	if p.peeker != nil && need >= 0 && want.Size <= maxPeek && want.End() <= a.end() && p.peek(t) {
		return emm.Success
	}
	return p.queue(t)
}

// maxPeek is the largest read that is done by whoever asks, in bytes: more is too long for a fault reader.
const maxPeek = 64 << 10

// peek answers a request if that needs no wait.
func (p *Pager) peek(t task) bool {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	b := t.buffer(buf, t.run.Size)
	n := min(t.run.Size, p.contents.limit()-t.run.Off)
	if !p.peeker.peek(b[:n], t.run.Off) {
		return false
	}
	t.supply(t.run.Off, b, int(n))
	return true
}

// DataReturn has the pages written. emm.ProtectionFailure if the contents can only be read.
func (p *Pager) DataReturn(h emm.Head, off int64, data []byte, _, _ bool) emm.KernReturn {
	r := emm.Run{Off: off, Size: int64(len(data))}
	a := p.message(h, r)
	switch {
	case a == nil, r.End() > a.end():
		return emm.InvalidArgument
	case !p.writable:
		return emm.ProtectionFailure
	}
	return p.queue(task{kind: writing, a: a, control: h.Control, run: r, data: data})
}

// Synchronize has everything that was written made safe.
func (p *Pager) Synchronize(h emm.Head, r emm.Run, _ emm.SyncFlags) emm.KernReturn {
	a := p.message(h, r)
	if a == nil {
		return emm.InvalidArgument
	}
	if !p.writable {
		h.Control.SynchronizeCompleted(r)
		return emm.Success
	}
	return p.queue(task{kind: syncing, a: a, control: h.Control, run: r})
}
