package vm

import (
	"fmt"
	"os"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/emm"
	"machpager/uffd"
)

// Mapping is a range of an object in a task's address space.
type Mapping struct {
	id       uint64
	obj      *Object // immutable
	task     *Task   // immutable; nil for the vm's own mapping
	fd       *uffd.FD
	off      int64 // immutable; bytes, whole pages, in the object
	size     int64 // immutable
	readOnly bool  // immutable: a private mapping of a file opened for reading; takes CONTINUE, never COPY
	spans    atomic.Pointer[[]span]
	gate     *gate
	pattern  pattern
	marks    marks
	wires    wirePages
	stats    mappingCounters
}

// span is a piece of a mapping: there is one, unless the task moved parts of it with mremap.
type span struct {
	addr uint64 // in the task
	off  int64  // bytes, in the object
	n    int64  // bytes
}

// NewMapping prepares a mapping of [off, off+size) of o (vm_map, first half). The file is for the task, which maps it, registers it with its
// userfaultfd and then calls Start; the caller closes it. The object is ready when NewMapping returns.
func (t *Task) NewMapping(o *Object, off, size int64, readOnly bool) (*Mapping, *os.File, error) {
	if size <= 0 || off&(o.pageSize-1) != 0 {
		return nil, nil, fmt.Errorf("map object: offset %d, size %d: want a multiple of the page size %d and a size above 0: %w", off, size, o.pageSize, emm.InvalidArgument)
	}
	a, b, err := o.pages(off, size)
	if err != nil {
		return nil, nil, fmt.Errorf("map object: %w", err)
	}
	if !t.gate.enter() {
		return nil, nil, fmt.Errorf("map object: the task has left: %w", emm.InvalidTask)
	}
	defer t.gate.leave()
	if !o.gate.enter() {
		return nil, nil, fmt.Errorf("map object: %w", emm.InvalidObject)
	}
	defer o.gate.leave()
	if err := o.ready(); err != nil {
		return nil, nil, err
	}
	var f *os.File
	if readOnly {
		f, err = o.file.ReadOnly()
	} else {
		f, err = o.file.Dup()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("map object: hand out its file: %w", err)
	}
	m := newMapping(t, o, o.vm.nextID.Add(1), a<<o.shift, (b-a)<<o.shift, readOnly)
	o.addMapping(m)
	t.addMapping(m)
	failpoint.Here("map.made")
	return m, f, nil
}

// newMapping is one that is nowhere yet.
func newMapping(t *Task, o *Object, id uint64, off, size int64, readOnly bool) *Mapping {
	m := &Mapping{id: id, obj: o, task: t, fd: t.fd, off: off, size: size, readOnly: readOnly, gate: newGate()}
	m.spans.Store(&[]span{})
	m.pattern.init(o)
	return m
}

// ID names the mapping in this vm, and in the one that adopts it.
func (m *Mapping) ID() uint64 { return m.id }

// Object is what is mapped.
func (m *Mapping) Object() *Object { return m.obj }

// Offset and Size are the mapped range of the object, in bytes, whole pages.
func (m *Mapping) Offset() int64 { return m.off }
func (m *Mapping) Size() int64   { return m.size }

// ReadOnly tells how it was mapped.
func (m *Mapping) ReadOnly() bool { return m.readOnly }

// Start tells where the task has mapped and registered it (vm_map, second half): from now on its faults are answered. The task must not touch
// the memory before.
func (m *Mapping) Start(addr uint64) error {
	if addr == 0 || addr%frameSize != 0 || addr+uint64(m.size) < addr {
		return fmt.Errorf("map object: address %#x: %w", addr, emm.InvalidAddress)
	}
	if old := m.spans.Load(); len(*old) != 0 || !m.spans.CompareAndSwap(old, &[]span{{addr: addr, off: m.off, n: m.size}}) {
		return fmt.Errorf("map object: started twice: %w", emm.InvalidArgument)
	}
	failpoint.Here("map.start")
	return m.task.mapped(m)
}

// Close ends the mapping, when the task has unmapped it or is gone. Idempotent.
func (m *Mapping) Close() {
	failpoint.Here("unmap.begin")
	if !m.gate.close() {
		return
	}
	m.unwireAll()
	failpoint.Here("unmap.unwired")
	m.task.removeMapping(m)
	m.obj.removeMapping(m)
	failpoint.Here("unmap.done")
}

// pages is the range of the object's pages that m maps.
func (m *Mapping) pages() (a, b int64) { return m.off >> m.obj.shift, (m.off + m.size) >> m.obj.shift }

// has reports whether m maps page p.
func (m *Mapping) has(p int64) bool { a, b := m.pages(); return a <= p && p < b }

// each calls fn for the pieces of the pages [a, b) where the task has them, with the offset in the object; it stops at false.
func (m *Mapping) each(a, b int64, fn func(addr uint64, off, n int64) bool) {
	lo, hi := a<<m.obj.shift, b<<m.obj.shift
	for _, s := range *m.spans.Load() {
		l, h := max(lo, s.off), min(hi, s.off+s.n)
		if l < h && !fn(s.addr+uint64(l-s.off), l, h-l) {
			return
		}
	}
}

// addr is where the task has the page p in one piece, 0 if nowhere.
func (m *Mapping) addr(a, b int64) uint64 {
	lo, hi := a<<m.obj.shift, b<<m.obj.shift
	for _, s := range *m.spans.Load() {
		if s.off <= lo && hi <= s.off+s.n {
			return s.addr + uint64(lo-s.off)
		}
	}
	return 0
}

// moved follows an mremap of [from, from+n) to addr to: pieces of m that lay there lie elsewhere now. It reports whether any did.
func (m *Mapping) moved(from, to, n uint64) bool {
	return m.cut(from, n, func(s []span, p span) []span { return append(s, span{p.addr - from + to, p.off, p.n}) })
}

// unmapped follows something else's taking the place of [from, from+n). It reports whether any of m was there.
func (m *Mapping) unmapped(from, n uint64) bool {
	return m.cut(from, n, func(s []span, _ span) []span { return s })
}

// cut takes out what lies in [from, from+n), and puts in its place what instead appends for each piece. It reports whether that changed anything.
func (m *Mapping) cut(from, n uint64, instead func(s []span, piece span) []span) bool {
	for {
		old := m.spans.Load()
		var s []span
		for _, p := range *old {
			end := p.addr + uint64(p.n)
			lo, hi := max(p.addr, from), min(end, from+n)
			if lo >= hi {
				s = append(s, p)
				continue
			}
			if p.addr < lo {
				s = append(s, span{p.addr, p.off, int64(lo - p.addr)})
			}
			s = instead(s, span{lo, p.off + int64(lo-p.addr), int64(hi - lo)})
			if hi < end {
				s = append(s, span{hi, p.off + int64(hi-p.addr), int64(end - hi)})
			}
		}
		if slices.Equal(s, *old) {
			return false
		}
		if m.spans.CompareAndSwap(old, &s) {
			return true
		}
	}
}

// again is what to do about EAGAIN: an event of the task is unread, or its address space is just changing. It reports whether the offset off still
// lies at addr then.
func (m *Mapping) again(addr uint64, off int64) bool {
	m.task.again()
	for _, s := range *m.spans.Load() {
		if s.off <= off && off < s.off+s.n {
			return s.addr+uint64(off-s.off) == addr
		}
	}
	return false
}

// ownMapping is the vm's own mapping of o: registered, writable, and never touched, so that COPY has a way into the file when the only mapping that
// faults is read-only. It needs no frames and no protection: its entries are read-only, write-protected, and nobody uses them.
func (o *Object) ownMapping() (*Mapping, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.own != nil {
		return o.own, nil
	}
	fd, err := o.vm.selfFD()
	if err != nil {
		return nil, fmt.Errorf("fill for a read-only mapping: %w", err)
	}
	addr, err := mapFile(o.file.Fd(), o.size)
	if err != nil {
		return nil, fmt.Errorf("fill for a read-only mapping: map %d bytes: %w", o.size, err)
	}
	if _, err := fd.Register(addr, uint64(o.size), uffd.RegisterMissing|uffd.RegisterMinor|uffd.RegisterWP); err != nil {
		unmapFile(addr, o.size)
		return nil, fmt.Errorf("fill for a read-only mapping: %w", err)
	}
	m := &Mapping{obj: o, fd: fd, size: o.size, gate: newGate()}
	m.spans.Store(&[]span{{addr: addr, n: o.size}})
	o.own = m
	return m, nil
}

func (m *Mapping) unmapOwn() {
	if m.gate.close() {
		unmapFile((*m.spans.Load())[0].addr, m.size)
	}
}

// mapFile maps memory that is an address only: no Go pointer to it is ever made.
func mapFile(fd int, n int64) (uint64, error) {
	p, err := unix.MmapPtr(fd, 0, nil, uintptr(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return 0, err
	}
	addr := uint64(uintptr(p))
	_, _, e := unix.Syscall(unix.SYS_MADVISE, uintptr(addr), uintptr(n), unix.MADV_DONTFORK)
	if e != 0 {
		unix.MunmapPtr(p, uintptr(n))
		return 0, e
	}
	return addr, nil
}

func unmapFile(addr uint64, n int64) { unix.Syscall(unix.SYS_MUNMAP, uintptr(addr), uintptr(n), 0) }

// taskSpan is a span as the reader looks it up.
type taskSpan struct {
	span
	m *Mapping
}

func sortSpans(maps []*Mapping) []taskSpan {
	var s []taskSpan
	for _, m := range maps {
		for _, p := range *m.spans.Load() {
			s = append(s, taskSpan{p, m})
		}
	}
	slices.SortFunc(s, func(x, y taskSpan) int {
		switch {
		case x.addr < y.addr:
			return -1
		case x.addr > y.addr:
			return 1
		}
		return 0
	})
	return s
}
