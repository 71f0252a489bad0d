package vm

import (
	"context"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/internal/frames"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// MaxObjectSize is the largest object, in bytes: what fits twice into a process's address space.
const MaxObjectSize = 1 << 46

// ObjectOptions describe a memory object to NewObject.
type ObjectOptions struct {
	Port        emm.Port    // the memory object's port; with a nil Manager the one that it gets with its first page-out, zero: made then
	Size        int64       // bytes, 1 to MaxObjectSize; rounded up to whole pages
	PageSize    int         // bytes, a power of two from 4096 to 2 MiB; 0: 4096
	ClusterSize int64       // bytes asked for at once around a fault, a power of two up to 2 MiB; 0: as the pattern of faults suggests
	ResidentMin int64       // bytes that page-out leaves resident for the sake of others; 0: none
	ResidentMax int64       // bytes that may be resident at once, at least 8 pages; 0: as many as the budget allows
	Account     *Account    // bounds what is resident of this and other objects together; nil: nothing does
	Fresh       bool        // the manager has no contents that this object did not return: what was never touched need not be discarded there. True if Manager is nil
	Manager     emm.Manager // nil: a temporary object of the vm's own (vm_allocate): zeros, given to the default manager at its first page-out
}

// Object is a memory object as this vm knows it: its page table, its file of frames, who manages it and who maps it.
type Object struct {
	vm       *VM
	id       uint64          // immutable
	limit    atomic.Int64    // pages; beyond, a touch is an error; at most npages
	size     int64           // immutable; bytes, whole pages
	pageSize int64           // immutable
	shift    uint            // immutable; log2(pageSize)
	words    []atomic.Uint64 // immutable slice, atomic words; npages of them: package page
	table    Table           // immutable
	file     *frames.File    // immutable
	control  *control        // immutable
	fresh    bool            // immutable; as ObjectOptions
	cluster  int64           // immutable; pages asked for at once, at least 1
	stuck    stuckFrames     // of those that are reserved
	resident atomic.Int64    // frames reserved for this object
	spared   atomic.Bool     // whoever it counts for has no more than his share: see share.go
	stalled  atomic.Bool     // a data return has been unanswered for long, and none was completed since
	room     residency
	account  *Account // immutable; nil: none
	maps     atomic.Pointer[[]*Mapping]
	attrs    atomic.Pointer[emm.Attributes]
	binding  atomic.Pointer[binding] // nil: no manager yet
	freeze   sync.RWMutex            // held shared while a page is made Dirty, alone by Snapshot; readers only try
	gate     *gate                   // open while the object lives

	resizeMu sync.Mutex // held across Discard: one SetSize at a time
	initOnce sync.Once
	initErr  error // written in initOnce

	mu   sync.Mutex
	port emm.Port // guarded by mu; of a vm_allocate object: made at its Create
	own  *Mapping // guarded by mu: the vm's own mapping, for readers that cannot take a COPY

	broken  []int64   // pages in Error when the object was adopted; until Resume
	strange []pageRun // pages that were resident when the object was adopted and that the policy has not heard of; from Resume on introduce's

	reqMu    sync.Mutex
	requests []*request               // guarded by reqMu
	returns  []*dataReturn            // guarded by reqMu
	lent     loan                     // of the return buffers
	reasons  map[int64]emm.KernReturn // guarded by reqMu: of pages in Error

	syncs synchronizations

	stats objectCounters
}

// binding is an object's manager with what was found out about it.
type binding struct {
	manager   emm.Manager
	def       emm.DefaultManager // set if the object was handed over by Create: first returns are DataInitialize
	completer emm.Completer      // nil if the manager does not care
	failing   *storeFailing
	port      emm.Port
	seqno     atomic.Uint32
}

func (b *binding) head(o *Object) emm.Head {
	return emm.Head{Object: b.port, Control: o.control, Seqno: b.seqno.Add(1) - 1}
}

// NewObject makes the vm know a memory object. Its manager is told (Init) at the first mapping.
func (v *VM) NewObject(opt ObjectOptions) (*Object, error) {
	o, err := v.object(opt)
	if err != nil {
		return nil, fmt.Errorf("create object: %w", err)
	}
	o.id = v.nextID.Add(1)
	if o.table, err = v.newTable(o.id, o.size>>o.shift*8); err != nil {
		return nil, fmt.Errorf("create object: page table of %d pages: %w", o.size>>o.shift, err)
	}
	failpoint.Here("create.table")
	o.words = o.table.Words()[:o.size>>o.shift]
	o.limit.Store(o.size >> o.shift)
	if o.file, err = v.frames.NewFile(o.size); err != nil {
		o.table.Close()
		return nil, fmt.Errorf("create object: file of frames: %w", err)
	}
	if err := v.guarantee(o.room.min); err != nil {
		o.file.Close()
		o.table.Close()
		return nil, fmt.Errorf("create object: %w", err)
	}
	if opt.Manager != nil {
		o.bind(opt.Manager, opt.Port)
	}
	failpoint.Here("create.file")
	v.mu.Lock()
	v.objects[o.id] = o
	v.mu.Unlock()
	return o, nil
}

// object checks the options and makes an object of them, without a number, a table or a file.
func (v *VM) object(opt ObjectOptions) (*Object, error) {
	if opt.PageSize == 0 {
		opt.PageSize = frameSize
	}
	ps := int64(opt.PageSize)
	switch {
	case ps < frameSize || ps > extentSize || ps&(ps-1) != 0:
		return nil, fmt.Errorf("page size %d: want a power of two from %d to %d: %w", ps, frameSize, extentSize, emm.InvalidArgument)
	case opt.Size <= 0 || opt.Size > MaxObjectSize:
		return nil, fmt.Errorf("size %d: want 1 to %d bytes: %w", opt.Size, int64(MaxObjectSize), emm.InvalidArgument)
	case opt.ClusterSize < 0 || opt.ClusterSize > extentSize || opt.ClusterSize&(opt.ClusterSize-1) != 0:
		return nil, fmt.Errorf("cluster size %d: want 0 or a power of two up to %d: %w", opt.ClusterSize, extentSize, emm.InvalidArgument)
	}
	size := (opt.Size + ps - 1) &^ (ps - 1)
	o := &Object{vm: v, size: size, pageSize: ps, shift: uint(bits.TrailingZeros64(uint64(ps))), port: opt.Port, gate: newGate(), reasons: map[int64]emm.KernReturn{}}
	o.fresh = opt.Fresh || opt.Manager == nil
	o.control = &control{o: o}
	o.maps.Store(&[]*Mapping{})
	o.attrs.Store(&emm.Attributes{})
	if opt.ClusterSize != 0 {
		o.cluster = max(1, opt.ClusterSize>>o.shift)
	}
	if err := o.room.set(opt.ResidentMin, opt.ResidentMax, size, ps); err != nil {
		return nil, err
	}
	if a := opt.Account; a != nil {
		switch {
		case a.max*frameSize < minResidentMax*ps:
			return nil, fmt.Errorf("page size %d: all objects of this owner together may have %d bytes resident, which are fewer than %d such pages: %w", ps, a.max*frameSize, minResidentMax, emm.ResourceShortage)
		case o.room.min > a.max-minResidentMax/2*ps/frameSize:
			return nil, fmt.Errorf("resident minimum %d: all objects of this owner together may have %d bytes resident: %w", opt.ResidentMin, a.max*frameSize, emm.ResourceShortage)
		}
		o.account = a
	}
	return o, nil
}

func (o *Object) bind(m emm.Manager, port emm.Port) *binding {
	b := &binding{manager: m, port: port, failing: o.vm.failings.enter(m, o.account)}
	b.completer, _ = m.(emm.Completer)
	o.binding.Store(b)
	return b
}

// ID names the object in this vm, and in the one that adopts it.
func (o *Object) ID() uint64 { return o.id }

// File is where the object's resident pages are.
func (o *Object) File() *frames.File { return o.file }

// Table is the object's page table, as Options.NewTable made it.
func (o *Object) Table() Table { return o.table }

// Port is the object's port; zero for an object of vm_allocate that was never paged out, unless it was made with one.
func (o *Object) Port() emm.Port {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.port
}

// Size is the object's size in bytes, whole pages: what it was made with, or SetSize has made of it.
func (o *Object) Size() int64 { return o.limit.Load() << o.shift }

// PageSize is the object's page size in bytes.
func (o *Object) PageSize() int { return int(o.pageSize) }

// framesOf is the number of frames of n pages.
func (o *Object) framesOf(n int64) int { return int(n << o.shift / frameSize) }

func (o *Object) word(p int64) page.Word { return page.Word(o.words[p].Load()) }

// step makes the transition of page p for event e: the new word, the one before, and what the caller owes.
func (o *Object) step(p int64, e page.Event) (now, before page.Word, eff page.Effect) {
	for {
		before = page.Word(o.words[p].Load())
		now, eff = page.Next(before, e)
		if now == before || o.words[p].CompareAndSwap(uint64(before), uint64(now)) {
			return now, before, eff
		}
	}
}

// stepFrom is step for a page that must be in state s: Refused if it is not.
func (o *Object) stepFrom(p int64, s page.State, e page.Event) page.Effect {
	for {
		w := o.word(p)
		if w.State() != s {
			return page.Refused
		}
		now, eff := page.Next(w, e)
		if now == w || o.words[p].CompareAndSwap(uint64(w), uint64(now)) {
			return eff
		}
	}
}

// end makes a transition that the owner of page p owes, and wakes who waits.
func (o *Object) end(p int64, e page.Event) {
	if o.finish(p, e) {
		o.wake(p, p+1)
	}
}

// finish is end without the wake: it reports whether one is owed.
func (o *Object) finish(p int64, e page.Event) bool {
	_, before, eff := o.step(p, e)
	if eff == page.Refused {
		o.vm.bug("object %d page %d: %v in %v", o.id, p, e, before)
	}
	return eff&page.Wake != 0
}

// finishRun is finish for the pages [a, b), with one wake for all.
func (o *Object) finishRun(a, b int64, e page.Event) {
	wake := false
	for p := a; p < b; p++ {
		if o.finish(p, e) {
			wake = true
		}
	}
	if wake {
		o.wake(a, b)
	}
}

// wake ends the waits of all threads on the pages [a, b), in every mapping; they fault again and the table answers.
func (o *Object) wake(a, b int64) {
	for _, m := range *o.maps.Load() {
		m.wake(a, b)
	}
}

// reserve takes frames for up to n pages, at least one or none: the number of pages that may be filled.
func (o *Object) reserve(n int64) int64 {
	f, room := o.framesOf(1), o.admit(n)
	n = o.mayTake(room)
	if n == 1 {
		if !o.vm.frames.Reserve(f) {
			n = 0
		}
	} else if n > 1 {
		got := o.vm.frames.ReserveUpTo(f * int(n))
		n = int64(got / f)
		o.vm.frames.Release(got - int(n)*f)
	}
	if n < room {
		o.counted((n - room) * int64(f))
	}
	if n > 0 {
		o.vm.lackFrames()
	}
	return n
}

// counted changes what the object, and its account, have: by f frames that need no room, or that go.
func (o *Object) counted(f int64) {
	o.resident.Add(f)
	o.account.add(f)
}

// release gives the frames of n pages back.
func (o *Object) release(n int64) {
	if n == 0 {
		return
	}
	o.releaseFrames(int64(o.framesOf(n)))
}

func (o *Object) releaseFrames(f int64) {
	o.counted(-f)
	o.vm.frames.Release(int(f))
	o.vm.kickDeferred()
}

// ready sends Init, once, before the first mapping; whoever maps meanwhile waits for it. Init is sent without a lock but initOnce's.
func (o *Object) ready() error {
	o.initOnce.Do(func() {
		b := o.binding.Load()
		if b == nil || b.def != nil {
			return // a temporary object of our own: its manager gets Create
		}
		o.init(b)
	})
	return o.initErr
}

// init is called under initOnce.
func (o *Object) init(b *binding) {
	o.control.initialised.Store(true)
	if kr := b.manager.Init(b.head(o), int(o.pageSize)); kr.Err() != nil {
		o.initErr = fmt.Errorf("map object: its manager refused it: %w", kr)
	} else if o.control.destroyed.Load() {
		o.initErr = fmt.Errorf("map object: its manager destroyed it: %w", emm.InvalidObject)
	}
}

// adoptManager gives an object of vm_allocate to the default manager (memory_object_create), at its first page-out.
func (o *Object) adoptManager() (*binding, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if b := o.binding.Load(); b != nil {
		return b, nil
	}
	def := o.vm.defaultManager()
	if def == nil {
		return nil, fmt.Errorf("page out object %d: there is no default manager: %w", o.id, emm.Failure)
	}
	if o.port.IsNull() {
		o.port = emm.NewPort()
	}
	b := &binding{manager: def, def: def, port: o.port, failing: o.vm.failings.enter(def, o.account)}
	b.completer, _ = def.(emm.Completer)
	// Create is a direct call that must not block and has nothing to ask the vm for under o.mu: SetCookie and ChangeAttributes do not take it.
	h := emm.Head{Control: o.control, Seqno: o.vm.seqno.Add(1) - 1}
	if kr := def.Create(h, o.port, o.size, int(o.pageSize)); kr.Err() != nil {
		o.vm.failings.leave(b.failing)
		return nil, fmt.Errorf("page out object %d: the default manager refused it: %w", o.id, kr)
	}
	failpoint.Here("pageout.created")
	o.control.initialised.Store(true)
	o.binding.Store(b)
	return b, nil
}

// Terminate ends the object: its last right is gone. Its mappings must have been closed. The manager gets Terminate; pages of a temporary object are
// dropped, others are returned first. A manager that completes none of these for Options.EndPatience has not taken the rest: it is given up, and logged. Idempotent.
func (o *Object) Terminate() {
	o.answerAll(emm.MemoryError)                                         // nobody is left to wait for them
	if !o.temporary() && !o.control.destroyed.Load() && o.gate.enter() { // otherwise contents die with the object
		ctx, cancel := o.patience()
		err := o.lockPages(ctx, 0, o.npages(), emm.ReturnAll, true, &lockOp{ending: true}) // nobody maps it, so also while adopting
		cancel()
		o.gate.leave()
		if err != nil {
			o.vm.log.Warn("object ended with contents that its manager did not take", "object", o.id, "err", err)
		}
	}
	failpoint.Here("terminate.returned")
	o.syncs.end(emm.InvalidObject)
	if !o.gate.close() {
		return
	}
	o.orphanReturns()
	o.vm.mu.Lock()
	delete(o.vm.objects, o.id)
	o.vm.mu.Unlock()
	if b := o.binding.Load(); b != nil {
		o.vm.failings.leave(b.failing)
	}
	if b := o.binding.Load(); b != nil && o.control.initialised.Swap(false) {
		b.manager.Terminate(b.head(o))
	}
	o.mu.Lock()
	own := o.own
	o.own = nil
	o.mu.Unlock()
	if own != nil {
		own.unmapOwn()
	}
	o.vm.token.drop(nil, o)
	failpoint.Here("terminate.told")
	o.file.Close()
	failpoint.Here("terminate.emptied")
	o.vm.policy.Forget(o.frameRun(0, o.npages()))
	left := o.resident.Swap(0) // what is stuck is among them
	o.account.add(-left)
	o.vm.frames.Release(int(left))
	o.vm.guaranteed.add(-o.room.min)
	o.table.Close()
	o.vm.kickDeferred()
}

// patience is a context that ends when the manager has completed no data return for the vm's EndPatience.
func (o *Object) patience() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(o.vm.ctx)
	go func() {
		tick := time.NewTicker(max(time.Millisecond, o.vm.endPatience/8))
		defer tick.Stop()
		seen, since := o.stats.completed.Load(), time.Now()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-tick.C:
				if n := o.stats.completed.Load(); n != seen {
					seen, since = n, now
				} else if now.Sub(since) >= o.vm.endPatience {
					cancel(fmt.Errorf("the manager has completed nothing for %v: %w", o.vm.endPatience, emm.Failure))
					return
				}
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

func (o *Object) temporary() bool {
	b := o.binding.Load()
	if b == nil || b.def != nil {
		return true
	}
	return o.attrs.Load().Temporary
}

func (o *Object) npages() int64 { return int64(len(o.words)) }

// pages is the page range that covers the bytes [off, off+n), rounded outward, or an error if it leaves the object.
func (o *Object) pages(off, n int64) (a, b int64, err error) {
	if off < 0 || n < 0 || off > o.size || n > o.size-off {
		return 0, 0, fmt.Errorf("bytes %d to %d of an object of %d: %w", off, off+n, o.size, emm.InvalidArgument)
	}
	return off >> o.shift, (off + n + o.pageSize - 1) >> o.shift, nil
}

// Pages writes one byte per page from the offset off (bytes) on, as many as fit into dst, and returns how many: the low three bits are the
// page.State, bit 3 Busy, bit 4 set if the page is wired, bit 5 if precious.
func (o *Object) Pages(off int64, dst []byte) int {
	if !o.gate.enter() {
		return 0
	}
	defer o.gate.leave()
	a := off >> o.shift
	if off < 0 || a >= o.npages() {
		return 0
	}
	n := int(min(int64(len(dst)), o.npages()-a))
	for i := range n {
		w := o.word(a + int64(i))
		b := byte(w.State())
		if w.Busy() {
			b |= 1 << 3
		}
		if w.Wired() > 0 {
			b |= 1 << 4
		}
		if w&page.Precious != 0 {
			b |= 1 << 5
		}
		dst[i] = b
	}
	return n
}

func (o *Object) addMapping(m *Mapping) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := append(slices.Clone(*o.maps.Load()), m)
	o.maps.Store(&s)
}

func (o *Object) removeMapping(m *Mapping) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := slices.DeleteFunc(slices.Clone(*o.maps.Load()), func(x *Mapping) bool { return x == m })
	o.maps.Store(&s)
}

func offHeap(n int) ([]byte, error) {
	return unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
}

func unmapOffHeap(b []byte) {
	if b != nil {
		unix.Munmap(b)
	}
}

// extentPages is the number of pages in an extent.
func (o *Object) extentPages() int64 { return max(1, int64(extentSize)>>o.shift) }
