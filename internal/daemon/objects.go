package daemon

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/internal/vm"
	"machpager/pager/emm"
)

// object is a memory object and the rights to it.
type object struct {
	vm      *vm.Object   // immutable
	size    atomic.Int64 // bytes, as asked for
	port    emm.Port     // immutable; null: private, nobody can open it
	own     bool         // immutable; made by the default pager (default_pager_object_create)
	cluster int64        // immutable; bytes, as asked for
	manager emm.Manager  // immutable; nil: the default pager
	name    string       // immutable; of the manager
	record  objectRecord // immutable, but for Length, which is size, Lost, which is lost, and Rights, which are changed under sizeMu and recordMu
	lost    atomic.Bool  // the file behind it lost writes: see vnode.Options
	rights  int          // guarded by objects.mu; handles and mappings
	lesser  []*right     // guarded by objects.mu; ports that give less than the full right

	sizeMu   sync.Mutex // held by who changes size
	recordMu sync.Mutex // held while the guardian is told: the last to be told is how it is
}

// objects are all objects that somebody has a right to.
type objects struct {
	mu     sync.Mutex
	byPort map[digest]named   // guarded by mu
	byID   map[uint64]*object // guarded by mu; by number in the vm
	made   map[uint32]made    // guarded by mu; by user
}

func (t *objects) init() {
	t.byPort, t.byID, t.made = map[digest]named{}, map[uint64]*object{}, map[uint32]made{}
}

// add makes the first right.
func (t *objects) add(o *object) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o.rights++
	if t.byID[o.vm.ID()] == nil {
		t.charge(o, 1)
	}
	t.byID[o.vm.ID()] = o
	if !o.port.IsNull() {
		t.name(o.port, o, nil)
	}
}

// unowned reports whether nobody has a right to an object, known or not: it was on its way in or out when the pager before this one died.
func (t *objects) unowned(o *object) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return o.rights == 0
}

// open makes a right of a port.
func (t *objects) open(p emm.Port) (*object, *right, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, ok := t.find(p)
	if !ok {
		return nil, nil, fmt.Errorf("open object: no object has this port, any more or ever: %w", emm.InvalidArgument)
	}
	n.object.rights++
	return n.object, n.right, nil
}

// retain makes one more right for somebody who has one.
func (t *objects) retain(o *object) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o.rights++
}

// release takes a right, and reports whether it was the last: nobody can get a new one then.
func (t *objects) release(o *object) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o.rights--; o.rights > 0 {
		return false
	}
	t.charge(o, -1)
	delete(t.byID, o.vm.ID())
	t.forget(o)
	return true
}

// after lists objects with numbers above id, in their order, at most n.
func (t *objects) after(id uint64, n int) (list []*object, more bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, o := range t.byID {
		if i > id {
			list = append(list, o)
		}
	}
	slices.SortFunc(list, func(a, b *object) int {
		if a.vm.ID() < b.vm.ID() {
			return -1
		}
		return 1
	})
	if len(list) > n {
		return list[:n], true
	}
	return list, false
}

func (t *objects) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byID)
}

// objectSpec is what a task asks for.
type objectSpec struct {
	size, cluster int64 // size 0: the file's
	pageSize      int
	residentMin   int64 // bytes; 0: none
	residentMax   int64 // bytes; 0: none
	private       bool
	user          uint32 // who asks
	manager, arg  string
	file          *os.File // nil: none; the manager's from here on
}

// newObject makes an object with one right.
func (d *Daemon) newObject(ctx context.Context, s objectSpec) (*object, error) {
	if s.pageSize == 0 {
		s.pageSize = 4096
	}
	keep, file := false, -1 // a copy of the manager's, for the guardian
	defer func() {
		if s.file != nil && !keep {
			s.file.Close()
		}
		if file >= 0 {
			unix.Close(file)
		}
	}()
	if s.size == 0 && s.file != nil {
		var err error
		if s.size, err = fileSize(s); err != nil {
			return nil, fmt.Errorf("create object of its file's size: %w", err)
		}
	}
	switch {
	case s.size <= 0 || s.size > vm.MaxObjectSize:
		return nil, fmt.Errorf("create object: size %d: want 1 to %d bytes: %w", s.size, int64(vm.MaxObjectSize), emm.InvalidArgument)
	case s.pageSize < 4096 || s.pageSize > 2<<20 || s.pageSize&(s.pageSize-1) != 0:
		return nil, fmt.Errorf("create object: page size %d: want a power of two from 4096 to 2 MiB: %w", s.pageSize, emm.InvalidArgument)
	case int64(s.pageSize)*minPages > d.frames.Budget():
		return nil, fmt.Errorf("create object: page size %d: the %d bytes that may be resident are fewer than %d such pages: %w", s.pageSize, d.frames.Budget(), minPages,
			emm.ResourceShortage)
	case d.roomFor(s.user, s.size) != nil:
		return nil, fmt.Errorf("create object: %w", d.roomFor(s.user, s.size))
	case s.manager == "" && s.arg != "", s.manager == "" && s.file != nil:
		return nil, fmt.Errorf("create object: an argument or a file, but no manager to take it: %w", emm.InvalidArgument)
	}
	user, err := d.accounts.of(s.user)
	if err != nil {
		return nil, fmt.Errorf("create object: %w", err)
	}
	o := &object{name: s.manager, cluster: s.cluster}
	o.size.Store(s.size)
	if s.file != nil {
		err := withFD(s.file, func(fd int) (err error) {
			file, err = dupFD(fd)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("create object: %w", err)
		}
	}
	opt := vm.ObjectOptions{Size: s.size, PageSize: s.pageSize, ClusterSize: s.cluster, ResidentMin: s.residentMin, ResidentMax: s.residentMax, Account: user.vm}
	switch {
	case s.manager != "":
		got, err := d.openManager(ctx, s, o)
		if err != nil {
			return nil, fmt.Errorf("create object: manager %q: %w", s.manager, err)
		}
		keep = true
		o.manager, opt.Manager, opt.Port = got, got, emm.NewPort()
	case !s.private:
		opt.Port, opt.Manager, opt.Fresh = emm.NewPort(), d.pager, true
		if err := d.pager.ObjectCreate(opt.Port, s.size, s.pageSize); err != nil {
			return nil, err
		}
		o.own = true
	default:
		opt.Port = emm.NewPort() // for its first page-out; the next pager must know it too
	}
	if !s.private {
		o.port = opt.Port
	}
	if s.manager == "" {
		d.charge(user, opt.Port)
	}
	if o.vm, err = d.vm.NewObject(opt); err != nil {
		d.endManager(o, opt.Port)
		d.discharge(opt.Port)
		return nil, err
	}
	o.record = objectRecord{Port: opt.Port.String(), Size: s.size, PageSize: s.pageSize, Cluster: s.cluster, ResidentMin: s.residentMin, ResidentMax: s.residentMax,
		Private: s.private, User: s.user, Own: o.own, Manager: s.manager, Arg: s.arg}
	d.objects.add(o)
	if err := d.holdObject(o, file); err != nil {
		d.release(o)
		return nil, fmt.Errorf("create object: %w", err)
	}
	return o, nil
}

// releasePatience is how long who gives up the last right waits for the object's end: longer than that takes, unless a manager hesitates to take
// what is returned to it. The object ends all the same.
const releasePatience = time.Second

// release gives a right up; the object ends with the last.
func (d *Daemon) release(o *object) {
	if !d.objects.release(o) {
		return
	}
	done := make(chan struct{})
	d.ends.Go(func() {
		defer close(done)
		if o.own {
			d.pager.NoSenders(o.port) // its contents end with the Terminate that follows
		}
		o.vm.Terminate()
		failpoint.Here("daemon.end.terminated")
		if !o.own {
			d.endManager(o, o.port)
			d.discharge(o.vm.Port())
		}
		d.letGoObject(o.vm.ID())
	})
	select {
	case <-done:
	case <-time.After(releasePatience):
	}
}

// endManager ends what stands behind an object that is no more, or never was.
func (d *Daemon) endManager(o *object, port emm.Port) {
	if o.own {
		d.pager.NoSenders(port)
	}
	if c, ok := o.manager.(io.Closer); ok {
		if err := c.Close(); err != nil {
			d.log.Warn("close memory manager", "manager", o.name, "err", err)
		}
	}
}

// storedRuns are the parts of an object that are in paging space, as far as the default pager has it.
func (d *Daemon) storedRuns(o *object) []emm.Run {
	if o.manager != nil {
		return nil
	}
	port := o.vm.Port()
	if port.IsNull() {
		return nil // never paged out
	}
	runs, err := d.pager.ObjectPages(port)
	if err != nil {
		return nil
	}
	return runs
}
