// Package vm plays the Mach kernel: it owns memory objects, their page tables, the mappings of tasks and the faults in them. It asks memory
// managers (package emm) for contents and hands contents back to them.
//
// # How a fault goes
//
// One reader goroutine per task reads userfaultfd messages (reader.go) and decides each by the page's word alone (fault.go, package page). An
// absent page becomes Requested and the manager is asked (request.go); its answers come in on the control (control.go), on the reader's own
// goroutine or any other, and are installed (install.go: the only place with ioctls that give access). Cleaning and flushing is pageout.go, by
// goroutines of its own, never by readers.
//
// # Who may wait for what
//
// A reader never waits: not for I/O, not for frames, not for a page that somebody owns. A fault that cannot go on now is dropped (the
// owner of the page wakes all its mappings at the end, and the thread faults again) or deferred (defer.go) to a goroutine that makes frames
// free. Goroutines that page out may wait for managers and for return buffers.
//
// # Lock order
//
//	VM.mu                    objects, tasks; never held across anything that waits
//	  Object.mu              manager binding, mapping list, attributes
//	Object.freeze            shared by whoever makes a page Dirty, from the change of the word to the ioctl that follows it; alone by Snapshot. Readers only try it
//	Object.reqMu             outstanding requests and returns; a leaf
//	Task.mu                  mapping list of the task; a leaf
//	VM.deferMu               deferred faults; a leaf
//	failings.mu, storeFailing.mu, stuckFrames.mu   leaves
//	synchronizations.mu      synchronisations that are out; a leaf
//	bufferPool.mu            return buffers; a leaf
//
// No lock is held across a manager's method, nor, but for freeze, across an ioctl or a system call on a file. Page words are changed by compare-and-swap alone. A gate
// (gate.go) keeps an object, a mapping or a task alive while somebody works in it.
package vm

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"machpager/internal/frames"
	"machpager/internal/policy"
	"machpager/pager/emm"
	"machpager/uffd"
)

const (
	frameSize  = 4096    // bytes; what the kernel's page is
	extentSize = 2 << 20 // bytes; a folio that is filled and punched whole

	// MaxRequests is how many data requests may be outstanding for one object.
	MaxRequests = 64

	// DefaultTaskFaults is how many may be outstanding for the faults of one task, unless Options say otherwise.
	DefaultTaskFaults = 256
)

// Table is memory for a page table, one word per page: it must outlive the process (an arena).
type Table interface {
	Words() []atomic.Uint64
	Close() error
}

// Options for New. Frames and NewTable are needed.
type Options struct {
	Frames *frames.Pool
	// NewTable makes memory of at least n bytes, all zeros, for the page table of the object.
	NewTable func(object uint64, n int64) (Table, error)
	// Policy chooses victims; "": policy.Default. See policy.Names.
	Policy string
	// MaxReturn bounds the bytes lent to managers in data returns; 0: 16 MiB.
	MaxReturn int64
	// EndPatience is how long the end of an object waits for a manager that completes none of the data returns it has: then what it did not take is given up, and logged.
	// 0: 30 s.
	EndPatience time.Duration
	// TaskWired is how much of what can be wired one task may wire, in percent; 0: 75. The rest is for others.
	TaskWired int
	// TaskFaults is how many data requests may be out at once for the faults of one task, beside MaxRequests for each object; others wait. 0: DefaultTaskFaults.
	TaskFaults int
	// Adopting makes a vm that takes over what an earlier one left, and serves nothing before Resume: see adopt.go.
	Adopting bool
	// Moved is told where the pieces of a mapping are since its task has moved some of it (mremap(2)): whoever answers for ranges when this process cannot must know. It
	// is called on a fault reader with a lock of the task's held: it must neither wait nor call the vm. The mapping's Start and AdoptMapping are not told. nil: nobody cares.
	Moved func(t *Task, mapping uint64, spans []Span)
	// Log for what an operator should know; nil: discard.
	Log *slog.Logger
}

// VM is one "kernel": a page size of its own for each object, one budget of frames.
type VM struct {
	frames      *frames.Pool                                // immutable
	newTable    func(object uint64, n int64) (Table, error) // immutable
	log         *slog.Logger                                // immutable
	defMgr      atomic.Pointer[emm.DefaultManager]          // for future objects
	seqno       atomic.Uint32                               // of the default pager's port
	zero        []byte                                      // immutable; extentSize bytes of zeros, off the heap
	bufs        *bufferPool                                 // immutable
	told        func(t *Task, mapping uint64, spans []Span) // immutable; Options.Moved
	endPatience time.Duration                               // immutable
	taskWired   int64                                       // immutable; percent
	taskFaults  int64                                       // immutable
	nextID      atomic.Uint64
	adopting    atomic.Bool   // changed under mu
	resumed     chan struct{} // closed when no adoption is under way

	mu      sync.Mutex
	objects map[uint64]*Object // guarded by mu
	tasks   map[uint64]*Task   // guarded by mu

	selfOnce sync.Once
	self     *uffd.FD // the vm's own userfaultfd, for objects with read-only mappings only
	selfErr  error

	deferMu  sync.Mutex
	deferred []deferredFault // guarded by deferMu
	deferAt  map[waiting]int // guarded by deferMu; where in deferred
	kick     chan struct{}   // capacity 1: something was deferred or frames were freed
	starving atomic.Bool     // something is deferred
	heals    healQueue

	policy   policy.Replacement // immutable
	token    token
	wanted   atomic.Int64 // frames that deferred faults and Populate wait for
	wired    atomic.Int64 // frames of wired pages
	inflight atomic.Int64 // frames of victims that managers have not stored yet
	crowded  atomic.Bool  // an object is near its maximum
	light    lightFault   // see slice.go

	aheadJobs chan aheadJob
	cleaner   cleaner
	dealing   dealing     // the page-out daemon's alone
	contended atomic.Bool // some objects are spared: see share.go

	budgetMu    sync.Mutex // held across SetBudget: one at a time
	guaranteed  guarantees
	victims     []policy.Run // of the page-out daemon
	failings    failings
	shortLogged atomic.Int64 // ns since epoch: a fault got no frame, and that was logged
	refused     atomic.Bool  // the kernel had no frame though one was reserved

	closing sync.Once
	ctx     context.Context // ended by Close
	cancel  context.CancelFunc
	bg      sync.WaitGroup

	counters counters
}

// New makes a vm without objects.
func New(o Options) (*VM, error) {
	if o.Frames == nil || o.NewTable == nil {
		return nil, fmt.Errorf("new vm: frames and a page table maker are needed: %w", emm.InvalidArgument)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.MaxReturn == 0 {
		o.MaxReturn = 16 << 20
	}
	if o.EndPatience == 0 {
		o.EndPatience = 30 * time.Second
	}
	if o.TaskWired == 0 {
		o.TaskWired = 75
	}
	if o.TaskFaults == 0 {
		o.TaskFaults = DefaultTaskFaults
	}
	if o.TaskFaults < 0 {
		return nil, fmt.Errorf("new vm: %d data requests of a task at once: %w", o.TaskFaults, emm.InvalidArgument)
	}
	if o.TaskWired < 0 || o.TaskWired > 100 || o.EndPatience < 0 {
		return nil, fmt.Errorf("new vm: a task may wire %d percent, an end waits %v: %w", o.TaskWired, o.EndPatience, emm.InvalidArgument)
	}
	zero, err := offHeap(extentSize)
	if err != nil {
		return nil, fmt.Errorf("new vm: map zeros: %w", err)
	}
	v := &VM{frames: o.Frames, newTable: o.NewTable, log: o.Log, zero: zero, bufs: newBufferPool(o.MaxReturn),
		objects: map[uint64]*Object{}, tasks: map[uint64]*Task{}, kick: make(chan struct{}, 1), told: o.Moved, resumed: make(chan struct{}),
		endPatience: o.EndPatience, taskWired: int64(o.TaskWired), taskFaults: int64(o.TaskFaults)}
	if v.policy, err = policy.New(o.Policy, policy.Options{Capacity: max(1, o.Frames.Budget()/frameSize)}); err != nil {
		unmapOffHeap(zero)
		return nil, fmt.Errorf("new vm: %w", err)
	}
	v.heals.some = make(chan struct{}, 1)
	v.cleaner.kick = make(chan struct{}, 1)
	v.aheadJobs = make(chan aheadJob, streamJobs)
	v.ctx, v.cancel = context.WithCancel(context.Background())
	v.adopting.Store(o.Adopting)
	if !o.Adopting {
		close(v.resumed)
		v.begin()
	}
	return v, nil
}

// begin starts what goes on by itself.
func (v *VM) begin() {
	v.bg.Go(v.pageout)
	v.bg.Go(v.cleanAhead)
	for range streamWorkers {
		v.bg.Go(v.readAhead)
	}
	v.bg.Go(v.serveHeals)
	v.bg.Go(v.watchRequests)
}

// live waits until no adoption is under way: before, not all mappings of a page are known.
func (v *VM) live(ctx context.Context) error {
	select {
	case <-v.resumed:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for the end of adoption: %w", context.Cause(ctx))
	}
}

// SetDefaultManager makes m the manager of temporary objects from now on, and returns the one before it; objects that have a manager keep
// it. nil only asks (Mach: host_default_memory_manager).
func (v *VM) SetDefaultManager(m emm.DefaultManager) (old emm.DefaultManager) {
	if m == nil {
		return v.defaultManager()
	}
	if p := v.defMgr.Swap(&m); p != nil {
		return *p
	}
	return nil
}

func (v *VM) defaultManager() emm.DefaultManager {
	if p := v.defMgr.Load(); p != nil {
		return *p
	}
	return nil
}

// Close ends all tasks and objects and waits for the vm's goroutines. Threads that still fault are left to the guardian. Objects end at the same time, each as Terminate
// says, so managers that answer nothing keep it no longer than Options.EndPatience. Idempotent.
func (v *VM) Close() { v.closing.Do(v.close) }

func (v *VM) close() {
	v.mu.Lock()
	tasks := slices.Collect(maps.Values(v.tasks))
	v.mu.Unlock()
	for _, t := range tasks {
		t.Close()
	}
	var ends sync.WaitGroup
	for _, o := range v.allObjects() {
		ends.Go(o.Terminate)
	}
	ends.Wait()
	v.cancel()
	v.bg.Wait()
	v.bufs.close()
	if v.self != nil {
		v.self.Close()
	}
	unmapOffHeap(v.zero)
}

func (v *VM) allObjects() []*Object {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Collect(maps.Values(v.objects))
}

// selfFD is the vm's own userfaultfd. Nothing ever touches memory registered with it, so user-mode-only will do.
func (v *VM) selfFD() (*uffd.FD, error) {
	v.selfOnce.Do(func() {
		v.self, v.selfErr = uffd.Open(&uffd.OpenOptions{UserModeOnly: true,
			Features: uffd.FeatureMissingShmem | uffd.FeatureMinorShmem | uffd.FeatureWriteProtect | uffd.FeatureWriteProtectShmem})
	})
	return v.self, v.selfErr
}

// bug reports a broken invariant: a panic in tests, counted and logged in production.
func (v *VM) bug(format string, args ...any) {
	v.counters.bugs.Add(1)
	msg := "BUG: " + fmt.Sprintf(format, args...)
	if panicOnBug {
		panic(msg)
	}
	v.log.Error(msg)
}

// since is the time since t in nanoseconds.
func since(t time.Time) int64 { return int64(time.Since(t)) }
