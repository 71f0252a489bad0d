package vm

import (
	"sync/atomic"

	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// control is the memory control of an object: what a manager talks to. After the object's end every call is KERN_INVALID_ARGUMENT, as for a dead port.
type control struct {
	o           *Object
	cookie      atomic.Pointer[any]
	initialised atomic.Bool // Init or Create was sent
	destroyed   atomic.Bool
}

var _ emm.Control = (*control)(nil)

func (c *control) SetCookie(v any) { c.cookie.Store(&v) }

func (c *control) Cookie() any {
	if p := c.cookie.Load(); p != nil {
		return *p
	}
	return nil
}

// run checks a manager's range and gives it in pages.
func (o *Object) run(off, size int64) (a, b int64, ok bool) {
	mask := o.pageSize - 1
	if off < 0 || size <= 0 || off&mask != 0 || size&mask != 0 || off+size < off {
		return 0, 0, false
	}
	return off >> o.shift, (off + size) >> o.shift, true
}

func (c *control) enter() bool { return c.o.gate.enter() }
func (c *control) leave()      { c.o.gate.leave() }

func (c *control) DataSupply(off int64, data []byte, lock emm.Prot, precious, reply bool) emm.KernReturn {
	if !c.enter() {
		return emm.InvalidArgument
	}
	defer c.leave()
	a, b, ok := c.o.run(off, int64(len(data)))
	if !ok || lock != emm.ProtNone {
		return emm.InvalidArgument
	}
	supplied := int64(0)
	c.o.answer(a, b, func(r *request, lo, hi int64) {
		c.o.fill(r, lo, hi, data[(lo-a)<<c.o.shift:(hi-a)<<c.o.shift], precious)
		supplied += hi - lo
	})
	if bind := c.o.binding.Load(); reply && bind.completer != nil {
		result, errOff := emm.Success, int64(0)
		if supplied < b-a {
			result = emm.MemoryPresent
			for p := a; p < b; p++ {
				if c.o.word(p).State() != page.Absent {
					errOff = p << c.o.shift
					break
				}
			}
		}
		bind.completer.SupplyCompleted(bind.head(c.o), emm.Run{Off: off, Size: int64(len(data))}, result, errOff)
	}
	return emm.Success
}

// within does what a message says about the pages [a, b) of its run.
func (c *control) within(r emm.Run, do func(a, b int64)) emm.KernReturn {
	if !c.enter() {
		return emm.InvalidArgument
	}
	defer c.leave()
	a, b, ok := c.o.run(r.Off, r.Size)
	if !ok {
		return emm.InvalidArgument
	}
	do(a, b)
	return emm.Success
}

func (c *control) DataUnavailable(r emm.Run) emm.KernReturn {
	return c.within(r, func(a, b int64) {
		c.o.answer(a, b, func(r *request, lo, hi int64) { c.o.fill(r, lo, hi, nil, false) })
	})
}

func (c *control) DataError(r emm.Run, reason emm.KernReturn) emm.KernReturn {
	return c.within(r, func(a, b int64) {
		c.o.answer(a, b, func(r *request, lo, hi int64) { c.o.fail(r, lo, hi, reason) })
	})
}

func (c *control) ReturnCompleted(r emm.Run, result emm.KernReturn) emm.KernReturn {
	a, b, ok := c.o.run(r.Off, r.Size)
	if !ok {
		return emm.InvalidArgument
	}
	d := c.o.takeReturn(a, b)
	if d == nil {
		c.o.vm.counters.unasked.Add(b - a)
		return emm.Success
	}
	if c.enter() {
		if d.discard {
			c.o.discarded(d, result)
		} else {
			c.o.returned(d, result)
		}
		c.leave()
	}
	c.o.vm.bufs.put(d.buf, &c.o.lent)
	c.o.reqMu.Lock()
	c.o.landed(d)
	c.o.reqMu.Unlock()
	c.o.stalled.Store(false)
	c.o.stats.completed.Add(1)
	if d.op.daemon() {
		c.o.vm.kickNow()
	}
	d.op.done(result)
	return emm.Success
}

func (c *control) LockRequest(r emm.Run, ret emm.Return, flush bool, lock emm.Prot, reply bool) emm.KernReturn {
	if !c.enter() {
		return emm.InvalidArgument
	}
	defer c.leave()
	o := c.o
	a, b, ok := o.run(r.Off, r.Size)
	if !ok || lock != emm.ProtNoChange || ret > emm.ReturnAnything {
		return emm.InvalidArgument
	}
	b = min(b, o.npages())
	o.vm.bg.Go(func() {
		if !c.enter() {
			return
		}
		defer c.leave()
		if err := o.lockRange(o.vm.ctx, a, b, ret, flush); err != nil {
			o.vm.log.Warn("lock request", "object", o.id, "off", r.Off, "size", r.Size, "err", err)
		}
		if bind := o.binding.Load(); reply && bind != nil && bind.completer != nil {
			bind.completer.LockCompleted(bind.head(o), r)
		}
	})
	return emm.Success
}

func (c *control) ChangeAttributes(at emm.Attributes, reply bool) emm.KernReturn {
	if !c.enter() {
		return emm.InvalidArgument
	}
	defer c.leave()
	o, n := c.o, at.ClusterSize
	if n < 0 || n > extentSize || n&(n-1) != 0 || n != 0 && n < o.pageSize {
		return emm.InvalidArgument
	}
	o.attrs.Store(&at)
	if bind := o.binding.Load(); reply && bind != nil && bind.completer != nil {
		bind.completer.ChangeCompleted(bind.head(o), emm.FlavorBehavior)
	}
	return emm.Success
}

func (c *control) Attributes() (emm.Attributes, emm.KernReturn) {
	if !c.enter() {
		return emm.Attributes{}, emm.InvalidArgument
	}
	defer c.leave()
	return *c.o.attrs.Load(), emm.Success
}

func (c *control) Destroy(reason emm.KernReturn) emm.KernReturn {
	if !c.enter() {
		return emm.InvalidArgument
	}
	defer c.leave()
	if c.destroyed.Swap(true) {
		return emm.Success
	}
	o := c.o
	o.vm.log.Info("object destroyed by its manager", "object", o.id, "reason", reason)
	o.vm.bg.Go(o.destroy)
	return emm.Success
}
