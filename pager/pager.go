// Package pager is the default pager: the default memory manager. It keeps what the vm pages out of temporary objects in a
// [store.Store], and gives it back byte for byte.
//
// # Contents
//
// For each object there is a page map: one 64-bit word per page, 0 if the page was never written (or was all zeros when it was last returned),
// else the first of the slots that hold it. A return goes to new slots; when all of them are written the words are stored, one by one,
// and the old slots are freed. Never the other way: at every instant each word names contents that are complete. Zeros are stored as nothing.
//
// A return succeeds or fails as a whole, and what it failed to store it has not changed. (Killed in between, some pages have the new contents and
// others the old. The vm still has them all, and returns them again.)
//
// A snapshot is a copy of the page map, at one instant. Slots that several maps name are shared: each map gives up its share when no reader of its own
// is left, as if the slots were its own, and they are freed with the last one.
//
// # Objects
//
// [Pager.ObjectCreate] makes an object: it exists until [Pager.NoSenders], over any number of Init and Terminate. One that was
// taken over with Create exists until its Terminate.
//
// # Order
//
// Messages about pages that a return in progress covers wait for its end, first come first served; others do not wait for each other. Slots that
// a request reads are freed when it has been answered. After Terminate nothing is answered; only loans are given back: every DataReturn and DataInitialize
// gets its ReturnCompleted, because until then its data may be read by the store.
//
// # Restart
//
// The table of objects and the page maps live in memory that Options.NewMemory finds or makes by name. Each change is committed by one 64-bit store.
// New takes over what it finds there, and tells the store which slots are used. The vm then attaches to each object with Init, those that Create made
// included, and whoever keeps the rights ends with [Pager.Claim] what nobody has a right to. A snapshot becomes an object when its map is complete; shares are counted anew, from
// the maps.
//
// # Locks
//
//	object.snapshots (one snapshot of an object at a time)
//	  Pager.mu (which objects there are)
//	    object.mu (page map, requests and returns in progress; that of a snapshot being made after that of its source)
//	      shares.mu
//	      the store's own
//
// None but the first is held while a Control or an operation of the store is called.
package pager

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"machpager/pager/emm"
	"machpager/pager/store"
)

const (
	// MinPageSize and MaxPageSize bound the page size of objects, in bytes. It is a power of two.
	MinPageSize = store.SlotSize
	MaxPageSize = 2 << 20

	maxTransfer = 2 << 20  // bytes read into one buffer
	viewMin     = 64 << 10 // a contiguous part of this many bytes is lent rather than copied
)

// Options of a Pager.
type Options struct {
	// Store is where contents go. Required. It stays the caller's, to be closed after the Pager.
	Store store.Store
	// NewMemory finds the memory of this name, or makes it, empty. The Pager closes a memory when it needs it no more; a memory of that name made
	// later is a new one. Names are short and made of lower case letters, digits and dots. nil: anonymous memory, which ends with the process.
	NewMemory func(name string) (store.Memory, error)
	// ClusterSize is how many bytes the vm may ask for at once: the Attributes of every object. 0: 2 MiB.
	ClusterSize int64
	// MayCache lets the vm keep pages after the last unmapping.
	MayCache bool
	// Log gets errors of the store and the lack of paging space. nil: discard.
	Log *slog.Logger
}

// Pager is the default memory manager. All methods may be called from any goroutine.
type Pager struct {
	store      store.Store                             // immutable
	newMemory  func(name string) (store.Memory, error) // immutable
	attributes emm.Attributes                          // immutable
	log        *slog.Logger                            // immutable
	lends      bool                                    // immutable
	logged     atomic.Int64                            // when an error was logged, in ns
	unlogged   atomic.Int64                            // errors not logged since
	full       atomic.Bool                             // paging space was found full; warned once
	shares     shares
	hook       func(step string) // set by tests, before use

	mu      sync.Mutex
	quiet   sync.Cond             // with mu; an object was released
	closed  bool                  // guarded by mu
	table   *table                // guarded by mu
	objects map[emm.Port]*object  // guarded by mu; those that can be named
	ids     []*object             // guarded by mu; by place in the table; with those on their way out
	charges map[emm.Port]*Account // guarded by mu; of objects that are still to come
}

var _ emm.DefaultManager = (*Pager)(nil)

// New makes a default pager, or takes over what an earlier one left in its memory.
func New(o Options) (*Pager, error) {
	if o.Store == nil {
		return nil, fmt.Errorf("make default pager: no store: %w", emm.InvalidArgument)
	}
	p := &Pager{store: o.Store, newMemory: o.NewMemory, log: o.Log, lends: o.Store.Info().Lends, objects: make(map[emm.Port]*object)}
	p.quiet.L = &p.mu
	p.attributes = emm.Attributes{MayCache: o.MayCache, Temporary: true, ClusterSize: o.ClusterSize} // contents end with the last right
	if o.ClusterSize == 0 {
		p.attributes.ClusterSize = maxTransfer
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if p.newMemory == nil {
		p.newMemory = func(string) (store.Memory, error) { return store.NewAnonymous(0) }
	}
	if err := p.adopt(); err != nil {
		return nil, fmt.Errorf("make default pager: %w", err)
	}
	return p, nil
}

// adopt reads the table and the page maps, and tells the store what is used.
func (p *Pager) adopt() error {
	mem, err := p.newMemory("objects")
	if err != nil {
		return fmt.Errorf("open table of objects: %w", err)
	}
	if p.table, err = openTable(mem); err != nil {
		mem.Close()
		return err
	}
	fail := func(err error) error {
		for _, o := range p.ids {
			if o != nil {
				o.mem.Close()
			}
		}
		mem.Close()
		return err
	}
	for id := range p.table.len() {
		e, ok := p.table.get(id)
		if !ok {
			if p.table.stale(id) {
				p.forget(id)
			}
			continue
		}
		m, err := p.newMemory(mapName(id))
		if err != nil {
			return fail(fmt.Errorf("open page map of object %d: %w", id, err))
		}
		o := newObject(p, id, e, m)
		o.adopted = true
		p.setID(id, o)
		o.recount()
		p.objects[e.port] = o
	}
	if err := p.store.Rebuild(p.used); err != nil {
		return fail(fmt.Errorf("tell the store what is used: %w", err))
	}
	return nil
}

// forget gives back the map of an object that had ended, or was not made yet, when the earlier pager was killed. From New.
func (p *Pager) forget(id int) {
	m, err := p.newMemory(mapName(id))
	if err == nil {
		err = m.Close()
	}
	if err != nil {
		p.log.Warn("give back page map of an earlier object", "object", id, "err", err) // the next of this number does
		return
	}
	p.table.clear(id)
}

func mapName(id int) string { return fmt.Sprintf("map.%d", id) }

// setID puts o in its place. Called with mu, or from New.
func (p *Pager) setID(id int, o *object) {
	for id >= len(p.ids) {
		p.ids = append(p.ids, nil)
	}
	p.ids[id] = o
}

// create makes an object and commits it to the table.
func (p *Pager) create(e entry) (*object, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	o, err := p.reserve(e)
	if err != nil {
		return nil, err
	}
	return o, p.publish(o) // nothing has changed since reserve
}

// reserve makes an object that is not in the table yet, and that nobody can name. Called with mu.
func (p *Pager) reserve(e entry) (*object, error) {
	switch {
	case p.closed:
		return nil, emm.Failure
	case e.port.IsNull() || p.objects[e.port] != nil:
		return nil, emm.InvalidArgument
	case e.pageSize < MinPageSize || e.pageSize > MaxPageSize || e.pageSize&(e.pageSize-1) != 0 || e.size < 0 || e.size > maxObject:
		return nil, emm.InvalidArgument
	}
	id := 0
	for id < len(p.ids) && p.ids[id] != nil {
		id++
	}
	if err := p.table.reserve(id); err != nil {
		return nil, fmt.Errorf("make page map: %w: %w", emm.ResourceShortage, err)
	}
	p.step("pager.reserved")
	mem, err := p.newMemory(mapName(id))
	if err != nil {
		return nil, fmt.Errorf("make page map: %w: %w", emm.ResourceShortage, err)
	}
	if n := int64(len(mem.Bytes())); n > 0 { // an earlier object's, whose end was cut short
		if err := mem.Discard(0, n); err != nil {
			mem.Close()
			return nil, fmt.Errorf("make page map: %w: %w", emm.ResourceShortage, err)
		}
	}
	o := newObject(p, id, e, mem)
	p.setID(id, o)
	return o, nil
}

// publish commits a reserved object to the table. Called with mu.
func (p *Pager) publish(o *object) error {
	switch {
	case p.closed:
		return emm.Failure
	case p.objects[o.port] != nil:
		return emm.InvalidArgument
	}
	p.step("pager.mapped")
	if a := p.charges[o.port]; a != nil {
		delete(p.charges, o.port)
		o.account.Store(a)
		a.add(p, o.stored*int64(o.unit)) // of a snapshot; nobody else has the object yet
	}
	p.table.put(o.id, o.entry)
	p.objects[o.port] = o
	p.step("pager.published")
	return nil
}

// end makes the end of o, which is doomed and has no vm, known: to the table first, so that no restarted pager sees it, then to all who look for it. What is in progress goes on,
// and the last of it releases the slots.
func (p *Pager) end(o *object) {
	p.mu.Lock()
	if p.objects[o.port] == o {
		delete(p.objects, o.port)
		p.table.drop(o.id)
		p.step("pager.dropped")
	}
	p.mu.Unlock()
	o.mu.Lock()
	o.gone = true
	release := o.releasable()
	o.mu.Unlock()
	if release {
		go o.release()
	}
}

// Close ends all objects, with what they have in paging space, and waits for I/O in progress. It is idempotent.
func (p *Pager) Close() error {
	p.mu.Lock()
	first := !p.closed
	p.closed = true
	var live []*object
	for _, o := range p.objects {
		live = append(live, o)
	}
	p.mu.Unlock()
	for _, o := range live {
		o.mu.Lock()
		o.doomed = true
		o.detach()
		o.mu.Unlock()
		p.end(o)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.busy() {
		p.quiet.Wait()
	}
	if !first {
		return nil
	}
	return p.table.mem.Close()
}

// busy reports whether any object has not been released. Called with mu.
func (p *Pager) busy() bool {
	for _, o := range p.ids {
		if o != nil {
			return true
		}
	}
	return false
}
