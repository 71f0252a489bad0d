package vm

import (
	"context"
	"fmt"
	"sync"

	"machpager/internal/failpoint"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// wirePages counts, per page, how often a mapping has wired it; it exists once the mapping wires anything.
type wirePages struct {
	mu    sync.Mutex
	count map[int64]uint16 // guarded by mu; by page of the mapping, those above 0
}

// wireSlack is how many frames of the budget may not be wired, besides the reserve: those that one instruction may need, twice.
const wireSlack = 8

// Wire makes the bytes [off, off+n) of the mapping, from its beginning, resident and keeps them so until as many Unwires (vm_wire). A page may
// be wired 65535 times over all mappings. KERN_RESOURCE_SHORTAGE if the budget would be all wired, or the task would have more than Options.TaskWired of it. What devices pin must be wired: page-out cannot see pins.
func (m *Mapping) Wire(ctx context.Context, off, n int64) error {
	o := m.obj
	a, b, err := m.wireRange("wire", off, n)
	if err != nil {
		return err
	}
	if !m.gate.enter() {
		return fmt.Errorf("wire: the mapping is gone: %w", emm.InvalidAddress)
	}
	defer m.gate.leave()
	if !o.gate.enter() {
		return fmt.Errorf("wire: %w", emm.InvalidObject)
	}
	defer o.gate.leave()
	m.wires.mu.Lock()
	if m.wires.count == nil {
		m.wires.count = map[int64]uint16{}
	}
	first, f := m.off>>o.shift, int64(o.framesOf(1))
	done, over := a, false
	for ; done < b; done++ {
		n := m.wires.count[done-first]
		if over = n == 0 && !m.task.mayWire(f); over {
			break
		}
		if n == page.MaxWired || !o.wirePage(done) {
			if n == 0 {
				m.task.wired.Add(-f)
			}
			break
		}
		m.wires.count[done-first]++
	}
	m.wires.mu.Unlock()
	if done < b {
		m.unwire(a, done)
		if over {
			return fmt.Errorf("wire: one task may wire %d percent of the budget of %d bytes, without the reserve: %w", o.vm.taskWired, o.vm.frames.Budget(), emm.ResourceShortage)
		}
		return fmt.Errorf("wire: the budget of %d bytes would be all wired, or a page is wired too often: %w", o.vm.frames.Budget(), emm.ResourceShortage)
	}
	failpoint.Here("wire.counted")
	if err := m.Populate(ctx, off, n, !m.readOnly); err != nil {
		m.unwire(a, b)
		return fmt.Errorf("wire: %w", err)
	}
	return nil
}

// Unwire takes one Wire back, page by page; pages that this mapping has not wired are an error, and then none is unwired.
func (m *Mapping) Unwire(off, n int64) error {
	a, b, err := m.wireRange("unwire", off, n)
	if err != nil {
		return err
	}
	first := m.off >> m.obj.shift
	m.wires.mu.Lock()
	for p := a; p < b; p++ {
		if m.wires.count == nil || m.wires.count[p-first] == 0 {
			m.wires.mu.Unlock()
			return fmt.Errorf("unwire: page %d of the mapping is not wired by it: %w", p-first, emm.InvalidArgument)
		}
	}
	m.wires.mu.Unlock()
	m.unwire(a, b)
	return nil
}

func (m *Mapping) wireRange(what string, off, n int64) (a, b int64, err error) {
	o := m.obj
	if off < 0 || n < 0 || off > m.size || n > m.size-off {
		return 0, 0, fmt.Errorf("%s: bytes %d to %d of a mapping of %d: %w", what, off, off+n, m.size, emm.InvalidArgument)
	}
	return (m.off + off) >> o.shift, (m.off + off + n + o.pageSize - 1) >> o.shift, nil
}

// unwire takes one wiring of this mapping off each page in [a, b) that has one.
func (m *Mapping) unwire(a, b int64) {
	m.wires.mu.Lock()
	defer m.wires.mu.Unlock()
	if m.wires.count == nil {
		return
	}
	first := m.off >> m.obj.shift
	for p := a; p < b; p++ {
		if n := m.wires.count[p-first]; n > 0 {
			if n == 1 {
				delete(m.wires.count, p-first)
				m.task.wired.Add(-int64(m.obj.framesOf(1)))
			} else {
				m.wires.count[p-first] = n - 1
			}
			m.obj.unwirePage(p)
		}
	}
}

// unwireAll ends what is left of the mapping's wirings.
func (m *Mapping) unwireAll() {
	m.wires.mu.Lock()
	defer m.wires.mu.Unlock()
	m.task.wired.Add(-int64(len(m.wires.count)) * int64(m.obj.framesOf(1)))
	for i, n := range m.wires.count {
		for ; n > 0; n-- {
			m.obj.unwirePage(m.off>>m.obj.shift + i)
		}
	}
	m.wires.count = nil
}

// mayWire counts f more frames as wired by the task, if it may have so many.
func (t *Task) mayWire(f int64) bool {
	budget := t.vm.frames.Budget() / frameSize
	if t.wired.Add(f) <= (budget-unpromised(budget, f))*t.vm.taskWired/100 {
		return true
	}
	t.wired.Add(-f)
	return false
}

// wirePage wires page p once more, if the budget allows it. The frames of pages wired at all are counted.
func (o *Object) wirePage(p int64) bool {
	f := int64(o.framesOf(1))
	if !o.countWired(f) {
		return o.word(p).Wired() > 0 && o.wireMore(p)
	}
	now, _, eff := o.step(p, page.Wire)
	if eff == page.Refused || now.Wired() > 1 { // counted already
		o.uncountWired(f)
	}
	return eff != page.Refused
}

// wireMore wires a page that others have wired.
func (o *Object) wireMore(p int64) bool {
	now, _, eff := o.step(p, page.Wire)
	if eff == page.Refused {
		return false
	}
	if now.Wired() == 1 { // they have just let go
		o.step(p, page.Unwire)
		return false
	}
	return true
}

func (o *Object) unwirePage(p int64) {
	now, _, eff := o.step(p, page.Unwire)
	if eff == page.Refused {
		o.vm.bug("object %d page %d: unwired in %v", o.id, p, now)
		return
	}
	if now.Wired() == 0 {
		o.uncountWired(int64(o.framesOf(1)))
	}
}
