package guardian

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/uffd"
)

// Items that only this package speaks of, beside those of package ipc.
const (
	itemSocket ipc.ItemKind = 32 + iota // fd: a copy of a task's socket; ID: the session
	itemEnd                             // no fd; ID: a session whose task has left the pager while its memory may live on
)

// Range is a part of a task's address space, in bytes: registered on its userfaultfd.
type Range struct{ Start, Len uint64 }

// task is what is held of one task. Guarded by table.mu.
type task struct {
	name   string
	fd     *uffd.FD // nil: not told yet
	socket int      // -1: not told yet
	ranges map[uint64]Range
}

// table is all that the guardian knows.
type table struct {
	log   *slog.Logger
	eager *allowance // immutable

	mu      sync.Mutex
	tasks   map[uint64]*task    // guarded by mu; by session
	owner   map[uint64]uint64   // guarded by mu; mapping to session
	ending  map[uint64]*ending  // guarded by mu; tasks nobody else answers for any more
	kept    map[string]*os.File // guarded by mu; arenas and files by name
	changed chan struct{}       // guarded by mu; closed and replaced when an ending is over or has poisoned all
}

func newTable(log *slog.Logger) *table {
	return &table{log: log, eager: newAllowance(eagerMax), tasks: map[uint64]*task{}, owner: map[uint64]uint64{}, ending: map[uint64]*ending{},
		kept: map[string]*os.File{}, changed: make(chan struct{})}
}

// handler serves the pager's end of the link.
func (t *table) handler(ready chan<- struct{}) ipc.Handler {
	return func(_ context.Context, m *ipc.Message) (ipc.Reply, error) {
		switch m.Type {
		case ipc.TypePut:
			p, name, err := ipc.Decode[ipc.Put](m.Body)
			if err == nil {
				err = t.put(p, string(name), m)
			}
			return ipc.Reply{}, err
		case ipc.TypeDrop:
			d, _, err := ipc.Decode[ipc.Drop](m.Body)
			if err == nil {
				t.drop(d)
			}
			return ipc.Reply{}, err
		case ipc.TypeReady:
			select {
			case ready <- struct{}{}:
			default:
			}
			return ipc.Reply{}, nil
		}
		return ipc.Reply{}, fmt.Errorf("guardian: %v: %w", m.Type, ipc.ErrUnknown)
	}
}

// put notes one item. Only fds that are kept are taken from m.
func (t *table) put(p ipc.Put, name string, m *ipc.Message) error {
	want, kind := 1, ipc.KindAny
	switch p.Kind {
	case ipc.ItemTask:
		kind = ipc.KindUffd
	case itemSocket:
		kind = ipc.KindSocket
	case ipc.ItemRange, itemEnd:
		want = 0
	case ipc.ItemArena, ipc.ItemFile:
		kind = ipc.KindFile
	default:
		return fmt.Errorf("guardian: hold item of kind %d: %w", p.Kind, emm.InvalidArgument)
	}
	if m.NumFDs() != want {
		return fmt.Errorf("guardian: hold item of kind %d: %d file descriptors, want %d: %w", p.Kind, m.NumFDs(), want, ipc.ErrMalformed)
	}
	if want == 1 {
		if err := ipc.CheckKind(m.FD(0), kind); err != nil {
			return fmt.Errorf("guardian: hold item of kind %d: %w", p.Kind, err)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch p.Kind {
	case ipc.ItemTask:
		k := t.task(p.ID)
		if k.fd != nil {
			k.fd.Close()
		}
		unix.SetNonblock(m.FD(0), true) // the task can clear it again: serve looks
		k.name, k.fd = name, uffd.FromFd(m.TakeFD(0))
	case itemSocket:
		k := t.task(p.ID)
		if k.socket >= 0 {
			unix.Close(k.socket)
		}
		k.socket = m.TakeFD(0)
	case ipc.ItemRange:
		k := t.tasks[p.Parent]
		switch {
		case k == nil || k.fd == nil:
			return fmt.Errorf("guardian: hold range %d of task %d, whose userfaultfd it has not got: %w", p.ID, p.Parent, emm.InvalidName)
		case p.A%pageSize != 0 || p.B%pageSize != 0 || p.B == 0 || p.A+p.B < p.A:
			return fmt.Errorf("guardian: hold range %#x+%d, which is not whole pages: %w", p.A, p.B, emm.InvalidArgument)
		}
		k.ranges[p.ID] = Range{p.A, p.B}
		t.owner[p.ID] = p.Parent
	case itemEnd:
		t.end(p.ID)
	default:
		f := os.NewFile(uintptr(m.TakeFD(0)), name)
		if old := t.kept[name]; old != nil {
			old.Close()
		}
		t.kept[name] = f
	}
	return nil
}

// task finds or makes. With mu held.
func (t *table) task(id uint64) *task {
	k := t.tasks[id]
	if k == nil {
		k = &task{socket: -1, ranges: map[uint64]Range{}}
		t.tasks[id] = k
	}
	return k
}

func (t *table) drop(d ipc.Drop) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch d.Kind {
	case ipc.ItemTask:
		if k := t.forget(d.ID); k != nil && k.fd != nil {
			k.fd.Close()
		}
	case ipc.ItemRange:
		if k := t.tasks[t.owner[d.ID]]; k != nil {
			delete(k.ranges, d.ID)
		}
		delete(t.owner, d.ID)
	}
}

// forget takes a task off the table and closes its socket; the userfaultfd is the caller's. With mu held.
func (t *table) forget(id uint64) *task {
	k := t.tasks[id]
	if k == nil {
		return nil
	}
	delete(t.tasks, id)
	for m := range k.ranges {
		delete(t.owner, m)
	}
	if k.socket >= 0 {
		unix.Close(k.socket)
	}
	return k
}

// end begins the end of one task. With mu held.
func (t *table) end(id uint64) {
	k := t.tasks[id]
	if k == nil {
		return
	}
	if k.socket >= 0 {
		shutdown(k.socket)
	}
	t.forget(id)
	if k.fd == nil {
		return
	}
	if len(k.ranges) == 0 {
		k.fd.Close()
		return
	}
	e := newEnding(k.fd, k.ranges, t.log.With("task", k.name))
	t.ending[id] = e
	poisoned := make(chan struct{})
	go func() {
		defer close(poisoned)
		e.ahead(t.eager)
		t.note()
	}()
	go func() {
		e.serve()
		<-poisoned
		e.close()
		t.mu.Lock()
		delete(t.ending, id)
		t.mu.Unlock()
		t.note()
	}()
}

// endAll begins the end of all tasks: first every connection, then every wait.
func (t *table) endAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range t.tasks {
		if k.socket >= 0 {
			shutdown(k.socket)
		}
	}
	for id := range t.tasks {
		t.end(id)
	}
	for name, f := range t.kept {
		f.Close()
		delete(t.kept, name)
	}
}

// note tells wait that something is over.
func (t *table) note() {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.changed)
	t.changed = make(chan struct{})
}

// len is the number of tasks held or being ended.
func (t *table) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.tasks) + len(t.ending)
}

// wait returns when no task is left that would need an answer: all are gone, or, once stop was asked for (stop is not nil and the guardian is wanted
// no more), all that is absent in them is poisoned. One more value of stop ends the wait.
func (t *table) wait(stop <-chan os.Signal) {
	for {
		t.mu.Lock()
		changed, left := t.changed, 0
		for _, e := range t.ending {
			if stop == nil || !e.complete() {
				left++
			}
		}
		t.mu.Unlock()
		if left == 0 {
			return
		}
		select {
		case <-changed:
		case <-stop:
			t.log.Warn("leaving tasks whose faults nobody will answer", "tasks", left)
			return
		}
	}
}
