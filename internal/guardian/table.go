package guardian

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/uffd"
)

// Range is a part of a task's address space, in bytes: registered on its userfaultfd.
type Range struct{ Start, Len uint64 }

// key names an item.
type key struct {
	kind ipc.ItemKind
	id   uint64
}

// item is what is held under a key. Guarded by table.mu.
type item struct {
	order        uint64 // of its first Put
	parent, a, b uint64
	tail         []byte
	fd           int // -1: none
}

// table is all that the guardian knows.
type table struct {
	log   *slog.Logger
	eager *allowance // immutable
	mount mount
	most  int // immutable; file descriptors that may be held

	mu      sync.Mutex
	order   uint64                         // guarded by mu; of the last item
	items   map[key]*item                  // guarded by mu
	ranges  map[uint64]map[uint64]struct{} // guarded by mu; of each session
	held    int                            // guarded by mu; file descriptors of items
	giving  bool                           // guarded by mu: the items are being given to a new pager, and stay as they are
	ending  map[uint64]*ending             // guarded by mu; tasks nobody else answers for any more
	changed chan struct{}                  // guarded by mu; closed and replaced when an ending is over or has poisoned all
}

func newTable(log *slog.Logger) *table {
	return &table{log: log, eager: newAllowance(eagerMax), most: mostFDs(), items: map[key]*item{}, ranges: map[uint64]map[uint64]struct{}{}, ending: map[uint64]*ending{},
		changed: make(chan struct{})}
}

// spareFDs are never held, so that there is always one for what comes in, and for another pager.
const spareFDs = 256

// mostFDs is how many may be held under this process's RLIMIT_NOFILE.
func mostFDs() int {
	files := 1024
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) == nil {
		files = int(min(r.Cur, 1<<30))
	}
	return files - min(files/8, spareFDs)
}

// put notes one item. Only fds that are kept are taken from m.
func (t *table) put(p ipc.Put, tail []byte, m *ipc.Message) error {
	least, most, kind := 1, 1, ipc.KindAny
	switch {
	case p.Kind == ipc.ItemTask:
		kind = ipc.KindUffd
	case p.Kind == ipc.ItemSocket:
		kind = ipc.KindSocket
	case p.Kind == ipc.ItemRange || p.Kind == ipc.ItemEnd || p.Kind == ipc.ItemState:
		least, most = 0, 0
	case p.Kind.Kept():
		least = 0
	default:
		return fmt.Errorf("guardian: hold item of kind %d: %w", p.Kind, emm.InvalidArgument)
	}
	if n := m.NumFDs(); n < least || n > most {
		return fmt.Errorf("guardian: hold item of kind %d: %d file descriptors, want %d to %d: %w", p.Kind, n, least, most, ipc.ErrMalformed)
	}
	if m.NumFDs() == 1 {
		if err := ipc.CheckKind(m.FD(0), kind); err != nil {
			return fmt.Errorf("guardian: hold item of kind %d: %w", p.Kind, err)
		}
	}
	if len(tail) > ipc.MaxItemTail {
		return fmt.Errorf("guardian: hold item of kind %d: %d bytes of tail, at most %d: %w", p.Kind, len(tail), ipc.MaxItemTail, ipc.ErrMalformed)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.giving {
		return errGiving
	}
	if old := t.items[key{p.Kind, p.ID}]; m.NumFDs() == 1 && (old == nil || old.fd < 0) && t.held+len(t.ending) >= t.most {
		return fmt.Errorf("guardian: hold item of kind %d: it holds %d file descriptors (raise its RLIMIT_NOFILE): %w", p.Kind, t.most, emm.ResourceShortage)
	}
	switch p.Kind {
	case ipc.ItemEnd:
		t.end(p.ID)
		return nil
	case ipc.ItemRange:
		switch {
		case t.items[key{ipc.ItemTask, p.Parent}] == nil:
			return fmt.Errorf("guardian: hold range %d of task %d, whose userfaultfd it has not got: %w", p.ID, p.Parent, emm.InvalidName)
		case p.A%pageSize != 0 || p.B%pageSize != 0 || p.B == 0 || p.A+p.B < p.A:
			return fmt.Errorf("guardian: hold range %#x+%d, which is not whole pages: %w", p.A, p.B, emm.InvalidArgument)
		}
		t.remove(key{p.Kind, p.ID}) // it may have been another session's
		if t.ranges[p.Parent] == nil {
			t.ranges[p.Parent] = map[uint64]struct{}{}
		}
		t.ranges[p.Parent][p.ID] = struct{}{}
	case ipc.ItemTask:
		unix.SetNonblock(m.FD(0), true) // the task can clear it again: serve looks
	}
	i := &item{parent: p.Parent, a: p.A, b: p.B, tail: slices.Clone(tail), fd: m.TakeFD(0)}
	k := key{p.Kind, p.ID}
	if old := t.items[k]; old != nil {
		i.order = old.order
		t.closeFD(old)
	} else {
		t.order++
		i.order = t.order
	}
	if t.items[k] = i; i.fd >= 0 {
		t.held++
	}
	return nil
}

// errGiving refuses a pager that does not wait until it has been given all.
var errGiving = fmt.Errorf("guardian: the items are being given, wait for the last: %w", emm.Failure)

// closeFD closes what an item that is no more held. With mu held.
func (t *table) closeFD(i *item) {
	if i.fd >= 0 {
		unix.Close(i.fd)
		t.held--
	}
}

func (t *table) drop(d ipc.Drop) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.giving {
		return errGiving
	}
	t.remove(key{d.Kind, d.ID})
	if d.Kind == ipc.ItemTask {
		t.removeRanges(d.ID)
		t.remove(key{ipc.ItemSocket, d.ID})
	}
	return nil
}

// remove forgets an item and closes its fd. With mu held.
func (t *table) remove(k key) {
	i := t.items[k]
	if i == nil {
		return
	}
	delete(t.items, k)
	t.closeFD(i)
	if k.kind == ipc.ItemRange {
		if delete(t.ranges[i.parent], k.id); len(t.ranges[i.parent]) == 0 {
			delete(t.ranges, i.parent)
		}
	}
}

// removeRanges forgets the ranges of a session, and returns them. With mu held.
func (t *table) removeRanges(session uint64) []Range {
	var rs []Range
	for id := range t.ranges[session] {
		k := key{ipc.ItemRange, id}
		rs = append(rs, Range{t.items[k].a, t.items[k].b})
		delete(t.items, k)
	}
	delete(t.ranges, session)
	return rs
}

// end begins the end of one task. With mu held.
func (t *table) end(id uint64) {
	if s := t.items[key{ipc.ItemSocket, id}]; s != nil {
		shutdown(s.fd)
		t.remove(key{ipc.ItemSocket, id})
	}
	ranges := t.removeRanges(id)
	k := t.items[key{ipc.ItemTask, id}]
	if k == nil {
		return
	}
	delete(t.items, key{ipc.ItemTask, id})
	if len(ranges) == 0 {
		t.closeFD(k)
		return
	}
	t.held-- // the ending's
	e := newEnding(uffd.FromFdNonblock(k.fd), ranges, t.log.With("task", string(k.tail)))
	t.ending[id] = e
	t.retire()
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

// retire gives up the oldest endings beyond maxEndings, first those whose tasks have been poisoned as far as there was anything absent: those get SIGBUS as before. Only a page
// that such a task drops by its own hand and touches again is then answered by nobody. With mu held.
func (t *table) retire() {
	left := 0
	var oldest [2]uint64 // not complete, complete; 0: none. Sessions count from 1
	for id, e := range t.ending {
		if e.quit.Load() {
			continue
		}
		left++
		i := 0
		if e.complete() {
			i = 1
		}
		if oldest[i] == 0 || id < oldest[i] {
			oldest[i] = id
		}
	}
	if left <= maxEndings {
		return
	}
	id := oldest[1]
	if id == 0 {
		id = oldest[0]
	}
	e := t.ending[id]
	e.quit.Store(true)
	e.log.Warn("too many tasks have left the pager while their memory lives on: this one's faults are answered no more", "most", maxEndings)
}

// endAll begins the end of all tasks: first every connection, then every wait. Nothing is held after it.
func (t *table) endAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, i := range t.items {
		if k.kind == ipc.ItemSocket {
			shutdown(i.fd)
		}
	}
	for k := range t.items {
		if k.kind == ipc.ItemTask {
			t.end(k.id)
		}
	}
	for k := range t.items {
		t.remove(k)
	}
}

// note tells wait that something is over.
func (t *table) note() {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.changed)
	t.changed = make(chan struct{})
}

// tasks is the number of tasks held or being ended.
func (t *table) tasks() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.ending)
	for k := range t.items {
		if k.kind == ipc.ItemTask {
			n++
		}
	}
	return n
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
