package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/internal/frames"
	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/internal/vm"
	"machpager/pager/emm"
)

// What the guardian holds for the pager after this one, and what of it says what. Every item is put before anybody is told of what it stands for, and dropped after the
// last who knew has been told that it ends. The records are JSON in the tail of their item, but for wirings.

// Numbers of the settings.
const (
	settingPager   = 1 // pagerRecord: put last of what a pager makes before it serves, so without it nothing was ever served
	settingNumbers = 2 // A: handles and mappings have numbers up to this one
)

// pagerRecord is what a pager was started with and found out, and what an operator has changed since.
type pagerRecord struct {
	Resident int64        // bytes; the budget at the first start, from which sizes of stores are derived
	Budget   int64        // bytes; the budget now
	Restarts int          // pagers before this one
	Frames   frames.State // of the mount
}

// objectRecord is a memory object; its number is the item's.
type objectRecord struct {
	Port         string // in the vm, also of an object that nobody can open
	Size         int64  // bytes, as it was made
	Length       int64  // bytes, as SetSize has made it
	PageSize     int
	Cluster      int64         `json:",omitempty"`
	ResidentMin  int64         `json:",omitempty"`
	ResidentMax  int64         `json:",omitempty"`
	Private      bool          `json:",omitempty"` // nobody can open it
	User         uint32        `json:",omitempty"` // who made it
	Own          bool          `json:",omitempty"` // made by the default pager
	Manager, Arg string        `json:",omitempty"`
	Lost         bool          `json:",omitempty"` // the manager's file lost writes
	Rights       []rightRecord `json:",omitempty"`
}

// mappingRecord is a mapping; its number, session (Parent), object (A) and the request that made it (B) are the item's. That it was started says its ItemRange.
type mappingRecord struct {
	Offset, Size int64
	ReadOnly     bool      `json:",omitempty"`
	Right        string    `json:",omitempty"` // the port of the lesser right that it was made by
	Spans        []vm.Span `json:",omitempty"` // where its pieces are, once the task has moved any
}

// pagingRecord is a paging file; its number, and the session (Parent) and request (B) that asked for it, are the item's.
type pagingRecord struct {
	Dir         string
	Capacity    int64 `json:",omitempty"`
	Priority    int   `json:",omitempty"`
	Preallocate bool  `json:",omitempty"`
}

// encode makes the tail of an item.
func encode(record any) ([]byte, error) {
	b, err := json.Marshal(record)
	if err != nil {
		return nil, fmt.Errorf("make record: %w", err)
	}
	if len(b) > ipc.MaxItemTail {
		return nil, fmt.Errorf("make record: %d bytes, at most %d (a shorter name, argument or path): %w", len(b), ipc.MaxItemTail, emm.InvalidArgument)
	}
	return b, nil
}

// hold has the guardian hold an item. It does not end with a request that asked for it: half of what belongs together must not be left.
func (d *Daemon) hold(i guardian.Item) error {
	ctx, cancel := context.WithTimeout(context.Background(), guardianPatience)
	defer cancel()
	return d.guardian.Put(ctx, i)
}

// letGo ends hold. What the guardian keeps too long does no harm: the next pager finds that it belongs to nothing.
func (d *Daemon) letGo(kind ipc.ItemKind, id uint64) {
	ctx, cancel := context.WithTimeout(context.Background(), guardianPatience)
	defer cancel()
	if err := d.guardian.Drop(ctx, kind, id); err != nil && !errors.Is(err, ipc.ErrGone) && !errors.Is(err, ipc.ErrClosed) {
		d.log.Warn("let go", "kind", uint32(kind), "id", id, "err", err)
	}
}

// holdPager has the guardian hold the settings.
func (d *Daemon) holdPager() error {
	d.recordMu.Lock()
	defer d.recordMu.Unlock()
	tail, err := encode(d.record)
	if err != nil {
		return err
	}
	return d.hold(guardian.Item{Kind: ipc.ItemSetting, ID: settingPager, Tail: tail})
}

// holdObject has the guardian hold an object, its frames, and the file of its manager; file -1: it has none. The record is last: without it
// the others mean nothing.
func (d *Daemon) holdObject(o *object, file int) error {
	id, fl := o.vm.ID(), o.vm.File()
	failpoint.Here("daemon.object.made")
	if err := d.hold(guardian.Item{Kind: ipc.ItemFrameFile, ID: id, FD: fl.Fd()}); err != nil {
		return err
	}
	fl.OnRelease(func() { d.letGo(ipc.ItemFrameFile, id) })
	failpoint.Here("daemon.object.frames")
	if file >= 0 {
		if err := d.hold(guardian.Item{Kind: ipc.ItemManagerFile, ID: id, FD: file}); err != nil {
			return err
		}
	}
	err := d.holdRecord(o)
	failpoint.Here("daemon.object.held")
	return err
}

// holdRecord has the guardian hold the object as it is now.
func (d *Daemon) holdRecord(o *object) error {
	o.recordMu.Lock()
	defer o.recordMu.Unlock()
	r := o.record
	r.Length, r.Lost = o.size.Load(), o.lost.Load()
	tail, err := encode(r)
	if err != nil {
		return err
	}
	return d.hold(guardian.Item{Kind: ipc.ItemObject, ID: o.vm.ID(), Tail: tail})
}

// letGoObject is the end of an object that is no more: the record first, for what it names is not there any more. The frames go when the last task lets go of the file.
func (d *Daemon) letGoObject(id uint64) {
	d.letGo(ipc.ItemObject, id)
	failpoint.Here("daemon.end.dropped")
	d.letGo(ipc.ItemManagerFile, id)
}

// numbers are those of handles and mappings. None is used twice, also not by the next pager: a request that is sent again must not meet another's.
type numbers struct {
	mu    sync.Mutex
	last  uint64 // guarded by mu
	limit uint64 // guarded by mu; the guardian knows that numbers up to this one may have been used
}

// numberStep is how many numbers the guardian is told of at once.
const numberStep = 1024

// number makes a number.
func (d *Daemon) number() (uint64, error) {
	n := &d.numbers
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.last == n.limit {
		if err := d.hold(guardian.Item{Kind: ipc.ItemSetting, ID: settingNumbers, A: n.limit + numberStep}); err != nil {
			return 0, err
		}
		n.limit += numberStep
	}
	n.last++
	return n.last, nil
}

// movements are mappings that their tasks have moved with mremap(2), on their way to the guardian. The kernel lets the task go on when the pager has read of it,
// so for a moment a crash leaves a mapping where the next pager does not look: its faults end with SIGBUS.
type movements struct {
	some chan struct{} // capacity 1

	mu  sync.Mutex
	all map[uint64][]vm.Span // guarded by mu; by number in the vm
}

// moved notes where a mapping is. On a fault reader: it does not wait.
func (d *Daemon) moved(_ *vm.Task, mapping uint64, spans []vm.Span) {
	d.movements.mu.Lock()
	d.movements.all[mapping] = spans
	d.movements.mu.Unlock()
	select {
	case d.movements.some <- struct{}{}:
	default:
	}
}

// holdMovements tells the guardian until ctx ends.
func (d *Daemon) holdMovements(ctx context.Context) {
	for {
		select {
		case <-d.movements.some:
		case <-ctx.Done():
			return
		}
		d.movements.mu.Lock()
		all := d.movements.all
		d.movements.all = map[uint64][]vm.Span{}
		d.movements.mu.Unlock()
		for id, spans := range all {
			m, ok := d.mappings.Load(id)
			if !ok {
				continue
			}
			if err := m.(*mapping).move(d, spans); err != nil {
				d.log.Warn("a task has moved a mapping, and the guardian does not know where it is", "err", err)
			}
		}
	}
}

// move has the guardian know where the mapping is now.
func (m *mapping) move(d *Daemon, spans []vm.Span) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	m.record.Spans = spans
	if err := m.hold(d); err != nil {
		return err
	}
	if len(spans) == 0 {
		return nil
	}
	// The guardian poisons one range ahead of the touch; what is elsewhere it poisons when it is touched.
	return d.hold(guardian.Item{Kind: ipc.ItemRange, ID: m.id, Parent: m.session, A: spans[0].Addr, B: uint64(spans[0].Size)})
}

// hold has the guardian hold the mapping.
func (m *mapping) hold(d *Daemon) error {
	tail, err := encode(m.record)
	if err != nil {
		return err
	}
	return d.hold(guardian.Item{Kind: ipc.ItemMapping, ID: m.id, Parent: m.session, A: m.object.vm.ID(), B: uint64(m.seq), Tail: tail})
}

// dupFD makes a copy of a descriptor.
func dupFD(fd int) (int, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("copy file descriptor: %w", err)
	}
	return n, nil
}
