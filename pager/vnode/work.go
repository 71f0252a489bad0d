package vnode

import (
	"errors"
	"fmt"
	"runtime/debug"
	"sync"

	"machpager/pager/emm"
)

type kind uint8

const (
	reading kind = iota
	writing
	syncing
)

// task is one message of the vm.
type task struct {
	kind    kind
	a       *attachment
	control emm.Control
	run     emm.Run
	need    int64  // reading: the page that a thread waits for, or -1
	data    []byte // writing: lent until ReturnCompleted
}

// queue puts a task where it is found, and starts a worker if there may be one more.
func (p *Pager) queue(t task) emm.KernReturn {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return emm.InvalidObject
	}
	switch {
	case t.kind == syncing:
		p.syncs = append(p.syncs, t)
		if !p.syncing {
			p.syncing = true
			go p.synchronize()
		}
		return emm.Success
	case t.kind == writing:
		p.writes = append(p.writes, t)
	case t.need >= 0:
		p.urgent = append(p.urgent, t)
	default:
		p.ahead = append(p.ahead, t)
	}
	if p.running < p.workers {
		p.running++
		go p.work()
	}
	return emm.Success
}

// next takes the next task; false ends the worker. end: the contents are to be closed.
func (p *Pager) next() (t task, ok, end bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	from := &p.urgent
	switch {
	case len(p.urgent) > 0:
	case len(p.writes) > 0 && p.writing < max(1, p.workers-1): // who writes will find the others
		from = &p.writes
		p.writing++
	case len(p.ahead) > 0:
		from = &p.ahead
	default:
		p.running--
		return task{}, false, p.end()
	}
	t = (*from)[0]
	(*from)[0] = task{}
	*from = (*from)[1:]
	return t, true, false
}

// work does tasks until there are none.
func (p *Pager) work() {
	debug.SetPanicOnFault(true) // a ReadAt that copies from a mapped file which was truncated
	idle := false
	defer func() {
		if !idle { // runtime.Goexit in somebody's ReadAt
			go p.work()
		}
	}()
	for {
		t, ok, end := p.next()
		switch {
		case !ok:
			idle = true
			if end {
				p.closeLate()
			}
			return
		case t.kind == writing:
			p.write(t)
		case !t.a.ended.Load():
			p.read(t)
		}
	}
}

// closeLate closes the contents when Close has returned already.
func (p *Pager) closeLate() {
	if err := p.closeContents(); err != nil {
		p.log.Warn("end memory object", "err", err)
	}
}

// buffers are for reads; the collector takes them when memory is wanted.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// read answers a data request.
func (p *Pager) read(t task) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	done, end := t.run.Off, min(t.run.End(), max(t.run.Off, t.a.end()))
	defer func() { // what is left: pages nobody waits for, pages beyond the end, and all if ReadAt has left by runtime.Goexit
		if done < t.run.End() {
			why := emm.MemoryError
			if done >= end {
				why = emm.MemoryFailure
			}
			t.answer(func(c emm.Control) { c.DataError(emm.Run{Off: done, Size: t.run.End() - done}, why) })
		}
	}()
	for done < end {
		size := end - done
		b := t.buffer(buf, size)
		n := 0
		err := contain(func() (err error) {
			n, err = p.contents.read(b, done)
			return err
		})
		p.note("read pages of a memory object", emm.Run{Off: done, Size: size}, err)
		if err == nil {
			t.supply(done, b, n)
			done = end
			break
		}
		bad := done + int64(n)&^(t.a.pageSize-1)
		if bad > done {
			t.answer(func(c emm.Control) { c.DataSupply(done, b[:bad-done], emm.ProtNone, false, false) })
			done = bad
		}
		if t.need > bad { // it may be in order: what failed is another page
			t.answer(func(c emm.Control) { c.DataError(emm.Run{Off: bad, Size: t.need - bad}, reason(err)) })
			done = t.need
			continue
		}
		t.answer(func(c emm.Control) { c.DataError(emm.Run{Off: bad, Size: end - bad}, reason(err)) })
		done = end
	}
}

// buffer is size bytes of buf, which grows if it has fewer.
func (t task) buffer(buf *[]byte, size int64) []byte {
	if int64(cap(*buf)) < size {
		*buf = make([]byte, size)
	}
	return (*buf)[:size]
}

// supply answers the pages of b, whose first n bytes are contents; the others are zeros.
func (t task) supply(off int64, b []byte, n int) {
	full := (int64(n) + t.a.pageSize - 1) &^ (t.a.pageSize - 1)
	clear(b[n:full])
	if full > 0 {
		t.answer(func(c emm.Control) { c.DataSupply(off, b[:full], emm.ProtNone, false, false) })
	}
	if rest := int64(len(b)) - full; rest > 0 {
		t.answer(func(c emm.Control) { c.DataUnavailable(emm.Run{Off: off + full, Size: rest}) })
	}
}

// answer calls f unless the vm has ended its use of the object.
func (t task) answer(f func(emm.Control)) {
	if !t.a.ended.Load() {
		f(t.control)
	}
}

// write keeps what was returned.
func (p *Pager) write(t task) {
	result := emm.MemoryError // if WriteAt leaves by runtime.Goexit
	defer func() {
		p.mu.Lock()
		p.writing--
		p.mu.Unlock()
		t.control.ReturnCompleted(t.run, result)
	}()
	data := t.data[:min(t.run.Size, p.contents.limit()-t.run.Off)]
	err := contain(func() error { return p.contents.write(data, t.run.Off) })
	p.note("write pages of a memory object", t.run, err)
	if err != nil {
		result = reason(err)
		return
	}
	result = emm.Success
}

// synchronize answers the synchronisations there are: one call of sync for all that came before it.
func (p *Pager) synchronize() {
	debug.SetPanicOnFault(true)
	idle := false
	defer func() {
		if !idle { // runtime.Goexit in somebody's sync
			go p.synchronize()
		}
	}()
	for {
		p.mu.Lock()
		tasks, end := p.syncs, false
		p.syncs = nil
		if len(tasks) == 0 {
			p.syncing = false
			end = p.end()
		}
		p.mu.Unlock()
		if len(tasks) == 0 {
			idle = true
			if end {
				p.closeLate()
			}
			return
		}
		p.syncAll(tasks)
	}
}

func (p *Pager) syncAll(tasks []task) {
	result := emm.MemoryError
	defer func() {
		for _, t := range tasks {
			t.answer(func(c emm.Control) {
				if result == emm.Success {
					c.SynchronizeCompleted(t.run)
				} else {
					c.SynchronizeError(t.run, result)
				}
			})
		}
	}()
	err := contain(p.contents.sync)
	p.note("synchronize memory object", tasks[0].run, err)
	if result = emm.Success; err != nil {
		result = reason(err)
	}
}

var errPanic = errors.New("panic")

// contain calls f and makes an error of its panic.
func contain(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: %v\n%s", errPanic, v, debug.Stack())
		}
	}()
	return f()
}
