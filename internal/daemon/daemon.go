// Package daemon is the pager process: it puts frames, paging space, the default pager and the vm together, accepts tasks, and turns
// their requests (package ipc) into calls of the vm.
//
// # Rights
//
// A task holds a right to an object by each handle and each mapping. A port is a name for an object that only who was told it can know, and no
// right: with its last right the object ends, whoever has its port written down. All that a connection holds is given up when it ends.
//
// # A mapping's way in and out
//
// Map makes it and hands over the file; the task maps the memory, inaccessible, and registers it; MapReady looks whether it did, has the
// guardian hold the range, and starts to serve; only then does the task make it accessible. So at no instant can a thread wait in a fault
// that neither pager nor guardian know of. Unmap goes the other way. When a connection ends, the mappings that are left are handed to the guardian, for the
// memory may live on in a process that only closed its socket.
//
// # Restart
//
// A pager can be killed at any instruction; the one after it takes over (adopt.go) what the guardian holds (hold.go). Nothing is told to a task before the
// guardian has it, and nothing is dropped there before its end is certain. So a crash leaves, by what was under way:
//
//	connection      before it is held: the connection ends, and Dial dials again. After: it is taken over, and the Hello comes again
//	userfaultfd     before: TaskUffd comes again. After: it finds that it was done
//	object          table and frames without the record: dropped. The record without a handle: the object ends, and the request makes another. The handle:
//	                the request finds it by session and seq
//	snapshot        as object; the default pager ends a copy that no record names
//	mapping         before it is held: Map comes again. After: it finds the mapping, and opens the file again. With the range: it is served, MapReady finds that
//	unmap, close    the vm's end, the range, the wirings, the record, in this order. With the record: taken over once more, ended when the request comes
//	                again. Without: the request finds nothing, which is success
//	end of object   the last right is dropped, then contents are returned, then table, frames and record go. With table and frames: it is ended again.
//	                Without one of them: the record is dropped
//	wiring          before the record: the request wires or unwires again. After: it finds its seq in it
//	size            the record is first: who takes over discards what lies beyond it, and the request does the same again
//	discard, page-out, sync, populate, budget    done again; see PROTOCOL.md for Discard
//	paging file     held before anything is written to it, let go when it is empty
//	session's end   socket and userfaultfd go first: what names a session without a socket is dropped
//
// Advice and counters are not held: they begin anew.
//
// # Locks
//
//	mapping.mu       one mapping's way in and out; held across calls to the guardian
//	object.sizeMu    one change of an object's size; held across calls to the guardian and the vm
//	numbers.mu, wires.mu, Daemon.recordMu    held across a call to the guardian
//	  session.mu     handles, mappings and the task of one connection
//	  objects.mu     objects by number and port, and their rights
//	limits.mu        connections by user
//
// The others are leaves. None but sizeMu is held across a manager's method or while a page is waited for.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/internal/frames"
	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/internal/vm"
	"machpager/pager"
	"machpager/pager/emm"
	"machpager/pager/store"
	"machpager/pager/store/files"
	"machpager/uffd"
)

// Manager is a memory manager that objects can ask for by name.
type Manager struct {
	Name string // not empty, nor "file" or "checked": those are the built-in managers of objects over files
	// Open makes the manager of one new object, with what the object's creator gave: an argument and perhaps a file, which is the manager's
	// then. It may take its time; the manager's methods may not. A manager that is an io.Closer is closed after its Terminate. One with a method
	// MaxProtection() emm.Prot that lacks emm.ProtWrite has objects that can only be mapped read-only. Package vnode makes managers.
	Open func(ctx context.Context, arg string, file *os.File) (emm.Manager, error)
	// Reopen says that what its objects contain outlives the process: when the pager has died, Open is called again in the next one for each of them, with the same
	// argument and file, and the manager has what was returned to it. false: such an object is lost with the pager; every touch of it is an error.
	Reopen bool
}

// Options for Run. Guardian is needed.
type Options struct {
	Config
	Managers []Manager
	Guardian *os.File // this process's end of the link to its guardian, hello read; stays the caller's
	Client   *os.File // the socket of the task that this pager belongs to: when it ends, so does the pager. nil: none
	Listener *os.File // with Config.Activated: the socket that tasks connect to, listening; stays the caller's
	Log      *slog.Logger
}

// minProcs is GOMAXPROCS at least: a manager that computes, or a collection, must not keep fault readers from running.
const minProcs = 4

// takeOverGC is the percentage of the collector (GOGC) until the pager serves.
const takeOverGC = 5000

// closeLimit bounds the end of a pager. What is left then is the guardian's.
const closeLimit = 3 * time.Second

// Daemon is a pager process.
type Daemon struct {
	config      Config              // immutable
	managers    map[string]*Manager // immutable
	log         *slog.Logger        // immutable
	guardian    *guardian.Client    // immutable
	tier        tier                // immutable
	most        mostMemory          // immutable; found out before the pager confines itself
	budget      int64               // immutable; bytes, at the start; frames knows what it is now
	confinement string              // immutable once it serves; what confine did, for people
	device      *os.File            // immutable; /dev/userfaultfd for tasks that may not open it; nil: none
	frames      *frames.Pool
	store       store.Store
	backing     *files.Store // the part of store that is files; nil: none is
	pager       *pager.Pager
	vm          *vm.VM
	probe       *prober
	objects     objects
	limits      limits
	accounts    accounts
	roster      roster
	checking    atomic.Bool // a check is under way

	// What outlives this process: see hold.go and adopt.go.
	arenas    arenas
	numbers   numbers
	movements movements
	mappings  sync.Map             // number in the vm to *mapping
	madeFiles map[request]files.ID // immutable; paging files that the pager before this one made
	recordMu  sync.Mutex
	record    pagerRecord // guarded by recordMu

	sessions sync.WaitGroup
	ends     sync.WaitGroup // objects on their way out; added to by sessions only
	lastID   atomic.Uint64  // number of the last session
	stop     chan struct{}  // closed by drain
	stopOnce sync.Once
}

// Run is the pager process. It returns nil when its client has gone (if it has one) or the guardian has asked it to stop and all tasks have left, and
// everything is cleaned up.
func Run(o Options) error {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if runtime.GOMAXPROCS(0) < minProcs {
		runtime.GOMAXPROCS(minProcs)
	}
	d := &Daemon{config: o.Config, managers: map[string]*Manager{}, log: o.Log, stop: make(chan struct{}),
		movements: movements{some: make(chan struct{}, 1), all: map[uint64][]vm.Span{}}}
	d.objects.init()
	d.limits.init()
	d.limits.quotas(o.Config.Quotas)
	d.accounts.resident, d.accounts.paging = d.limits.userResident, d.limits.userPaging
	for i, m := range o.Managers {
		if m.Name == "" || builtIn(m.Name) || m.Open == nil || d.managers[m.Name] != nil {
			return fmt.Errorf("start pager: memory manager %q: want a name of its own and an Open function", m.Name)
		}
		d.managers[m.Name] = &o.Managers[i]
	}
	// While it takes over, a collection would hold up who waits for it, and find nothing. The percentage bounds what is put off, at some hundred MiB.
	collect := debug.SetGCPercent(takeOverGC)
	items, err := d.standBy(o.Guardian)
	switch {
	case errors.Is(err, ipc.ErrGone):
		return nil // nobody has needed this pager, and nobody will
	case err != nil:
		return fmt.Errorf("start pager: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var own *net.UnixConn
	if o.Client != nil {
		if own, err = fileConn(o.Client); err != nil {
			return fmt.Errorf("start pager: %w", err)
		}
	}
	var listener *net.UnixListener
	left, err := d.open(items)
	if err == nil && o.Socket != "" {
		listener, err = d.listen(left, o.Listener)
	}
	if err == nil {
		err = d.confine(ctx)
	}
	if err == nil && left == nil {
		err = d.arm()
	}
	if err == nil && left != nil {
		failpoint.Here("daemon.adopt.resume")
		d.resume(left)
	}
	debug.SetGCPercent(collect)
	if err == nil {
		failpoint.Here("daemon.adopt.ready")
		err = d.guardian.Ready(ctx)
	}
	if err != nil && left != nil {
		return fmt.Errorf("start pager on what another left: %w", err) // for the next to try: nothing is given up
	}
	if err != nil {
		err = fmt.Errorf("start pager: %w", err)
		if own != nil {
			refuse(own, err)
		}
		if listener != nil {
			listener.Close()
		}
		d.close()
		return err
	}
	d.log.Info("the pager serves", "pid", os.Getpid(), "guardian", os.Getppid(), "tier", string(d.tier.letter), "frames", d.frames.Kind().String(),
		"budget", d.budget, "socket", o.Socket, "confinement", d.confinement)

	go func() {
		select {
		case <-d.guardian.Done():
			d.log.Error("the guardian is gone: no new tasks, and the end when those that are there have left; a crash of this pager would now leave threads waiting")
			if o.Client == nil { // else it ends with its client, as ever
				d.drain()
			}
		case <-ctx.Done():
		}
	}()
	go d.holdMovements(ctx)
	if listener != nil {
		go d.accept(ctx, listener)
	}
	ended := make(chan struct{}) // the client's connection; cleaning up after it comes under closeLimit
	end := sync.OnceFunc(func() { close(ended) })
	var restarted *ipc.Restarted
	if left != nil {
		restarted = &ipc.Restarted{PagerPID: int32(os.Getpid())}
		for _, s := range left.taken {
			done := func() {}
			if s.own && own != nil {
				own.Close() // it is the same
				own, done = nil, end
			}
			d.sessions.Go(func() { s.again(ctx, restarted, done) })
		}
	}
	if own != nil {
		d.sessions.Go(func() { d.serve(ctx, own, true, restarted, end) })
	}
	select {
	case <-ended:
	case <-d.stop:
	}
	if listener != nil {
		listener.Close()
	}
	if o.Client == nil {
		d.sessions.Wait() // they may leave in their own time: the guardian's patience is the limit
	}
	time.AfterFunc(closeLimit, func() {
		d.log.Error("the pager does not come to its end: leaving what is left to the guardian")
		os.Exit(guardian.ExitState) // another one would not do better
	})
	cancel()
	d.sessions.Wait()
	d.ends.Wait()
	return d.close()
}

// arm arms the failpoints of this pager: of the first when it is about to serve, of one that takes over when it begins to.
func (d *Daemon) arm() error {
	lives := strings.Split(d.config.Failpoints, ";")
	return failpoint.Arm(lives[min(d.record.Restarts, len(lives)-1)])
}

// drain is the guardian's Stop: no new tasks, and the end when the last has left.
func (d *Daemon) drain() { d.stopOnce.Do(func() { close(d.stop) }) }

// standBy waits until this pager is the one that serves: the first at once, the standby of another one when that has died. Until then it must touch nothing that
// the other uses, and of what comes from its client and from tasks it must not read a byte, nor even be woken by it. It ends with ipc.ErrGone if the guardian does.
func (d *Daemon) standBy(link *os.File) (items []guardian.Item, err error) {
	// What can be had before is had before. What it finds is open's to say, when somebody wants to hear it.
	_ = uffd.HaveRequired()
	if d.guardian, err = guardian.NewClient(link, d.drain, acceptsState, d.log); err != nil {
		return nil, err
	}
	return d.guardian.Items(context.Background())
}

// open makes everything that does not need a task, or takes over what an earlier pager left: then left is not nil, and resume must follow. What it made when it
// fails is close's, unless left is not nil.
func (d *Daemon) open(items []guardian.Item) (left *inheritance, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), guardianPatience)
	defer cancel()
	if left, err = d.inherit(items); err != nil {
		return left, err
	}
	d.tier, d.most = privilege(), theMost()
	if err = uffd.HaveRequired(); err != nil {
		return left, err
	}
	if left != nil {
		d.record.Restarts++
		if err = errors.Join(d.arm(), d.holdPager()); err != nil {
			return left, err
		}
	}
	if left == nil {
		if err = d.config.Check(); err != nil {
			return nil, err
		}
		if err := d.tellState(ctx); err != nil {
			return nil, err
		}
	}
	if d.probe, err = newProber(); err != nil {
		return left, err
	}
	if d.config.GiveDevice {
		if d.device, err = os.OpenFile(uffd.DevicePath, os.O_RDWR, 0); err != nil {
			return left, fmt.Errorf("hand out %s: %w", uffd.DevicePath, err)
		}
	}
	if err := d.openFrames(left); err != nil {
		return left, err
	}
	withBudget := d.config
	withBudget.Resident = d.record.Resident
	var paging []files.File
	if left != nil {
		paging = left.paging
	}
	if d.store, d.backing, err = d.openStore(withBudget, paging); err != nil {
		return left, err
	}
	if d.pager, err = pager.New(pager.Options{Store: d.store, NewMemory: d.newMap, Log: d.log}); err != nil {
		return left, err
	}
	if d.vm, err = vm.New(vm.Options{Frames: d.frames, NewTable: d.newTable, Policy: d.config.Policy, Adopting: left != nil, Moved: d.moved, TaskFaults: d.limits.taskFaults, Log: d.log}); err != nil {
		return left, err
	}
	d.vm.SetDefaultManager(d.pager)
	if left != nil {
		return left, d.adopt(left)
	}
	return nil, d.holdPager()
}

// openFrames makes the frames, or takes them over.
func (d *Daemon) openFrames(left *inheritance) (err error) {
	if left != nil {
		d.budget = d.record.Budget
		d.frames, err = frames.Open(frames.Options{Budget: d.budget, Adopt: &d.record.Frames, Mount: left.mount, Log: d.log})
		return err
	}
	if d.budget = d.config.Resident; d.budget == 0 {
		if d.budget, err = halfOfMemory(); err != nil {
			return err
		}
	}
	if d.frames, err = frames.Open(frames.Options{Budget: d.budget, Kind: d.config.Frames, Log: d.log}); err != nil {
		return err
	}
	d.record = pagerRecord{Resident: d.budget, Budget: d.budget, Frames: d.frames.State()}
	if fd := d.frames.MountFD(); fd >= 0 {
		return d.hold(guardian.Item{Kind: ipc.ItemMount, ID: 1, FD: fd})
	}
	return nil
}

// close undoes open. No session is left.
func (d *Daemon) close() error {
	var errs []error
	if d.vm != nil {
		d.vm.Close()
	}
	if d.pager != nil {
		errs = append(errs, d.pager.Close())
	}
	if d.store != nil {
		errs = append(errs, d.store.Close())
	}
	if d.frames != nil {
		errs = append(errs, d.frames.Close())
	}
	if d.device != nil {
		errs = append(errs, d.device.Close())
	}
	if d.probe != nil {
		d.probe.close()
	}
	if d.guardian != nil {
		errs = append(errs, d.guardian.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end pager: %w", err)
	}
	return nil
}

// accept takes tasks until the listener is closed.
func (d *Daemon) accept(ctx context.Context, l *net.UnixListener) {
	for {
		uc, err := l.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			d.log.Warn("accept task", "err", err)
			select {
			case <-time.After(100 * time.Millisecond): // EMFILE does not pass at once
				continue
			case <-ctx.Done():
				return
			}
		}
		failpoint.Here("daemon.session.accepted")
		d.sessions.Go(func() { d.serve(ctx, uc, false, nil, func() {}) })
	}
}

// refuse answers the first request of the client with why there is no pager, so that it gets more than text.
func refuse(uc *net.UnixConn, why error) {
	conn, err := ipc.NewConn(uc)
	if err != nil {
		uc.Close()
		return
	}
	told := make(chan struct{})
	var once sync.Once
	l := ipc.NewLink(conn, &ipc.LinkOptions{Handler: func(context.Context, *ipc.Message) (ipc.Reply, error) {
		return ipc.Reply{Done: func() { once.Do(func() { close(told) }) }}, why
	}})
	select {
	case <-told:
	case <-l.Done():
	case <-time.After(time.Second):
	}
	l.Close()
}

// fileConn makes a connection of an inherited socket; f stays the caller's.
func fileConn(f *os.File) (*net.UnixConn, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("take over the client's socket: %w", err)
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("take over the client's socket: it is no unix socket: %w", unix.EPROTOTYPE)
	}
	return uc, nil
}
