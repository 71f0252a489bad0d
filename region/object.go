//go:build linux

package region

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"

	"machpager/internal/ipc"
	"machpager/pager/emm"
)

// Page sizes an object may have, in bytes; powers of two.
const (
	MinPageSize = 4096
	MaxPageSize = 2 << 20
)

// ObjectOptions are the options of ObjectCreate. nil and zero values mean the defaults.
//
// ResidentMin and ResidentMax bound the object's share of the budget. An object at its maximum makes room among its own pages, so that it cannot push others out. One
// that has no more than its minimum in memory loses nothing to others; it reaches it by being used, nothing is read for its sake, and PageOut and Discard take
// pages below it. The minima of all objects and what is wired beyond them must fit into the budget less a reserve: emm.ResourceShortage. A minimum is rounded up to whole pages,
// and is the whole object where that is smaller; a maximum is rounded down.
type ObjectOptions struct {
	PageSize    int      // bytes, power of two from MinPageSize to MaxPageSize; 0: 4096
	ClusterSize int64    // bytes asked of the manager at once, power of two from PageSize to 2 MiB; 0: the pager's choice
	ResidentMin int64    // bytes that are not paged out for the sake of other objects; 0: none. See below
	ResidentMax int64    // bytes that may be in memory at once, at least 8 pages; 0: as many as the pager's budget allows
	Manager     string   // "file" or "checked" (see ObjectCreate), or one named in spawn.Main or known to the daemon; "": the default pager
	Arg         string   // for the manager
	File        *os.File // handed to the manager: for "file" and "checked", the file behind the object; nil: none. It stays the caller's
}

// AllocateOptions are the options of Allocate.
type AllocateOptions struct {
	ObjectOptions
	MapOptions
}

// Object is a right to a memory object. All methods may be called from any goroutine.
type Object struct {
	pager    *Pager       // immutable
	handle   uint64       // immutable
	port     *emm.Port    // immutable; by pointer, so that a %v of the Object does not tell it
	size     atomic.Int64 // bytes
	pageSize int          // immutable

	once   sync.Once
	closed chan struct{} // closed by Close
	err    error         // written inside once
}

// ObjectCreate makes a memory object of size bytes, all zeros, whose contents live until its last right goes (default_pager_object_create). size is 1
// or more; the last page may be partial. With o.Manager the object is that manager's, and so are its contents.
//
// The manager "file" makes an object of o.File, a regular file or a block device that is open for reading. size 0 is the file's size. Pages are read from it when
// they are touched. If it is open for writing too, what is changed goes back to it: at page-out, with [Region.Sync] durably, and when the object ends. Otherwise the
// object can only be mapped with MapOptions.ReadOnly (emm.ProtectionFailure). An object larger than the file makes the file grow, to the last byte
// written other than zero. What others do to the file meanwhile is not seen in pages that are in memory; if they truncate it, its lost pages are errors.
//
// The manager "checked" does the same in a file of a format of its own, with checksums: one that is empty is made, and grows to size; nobody else may have it open
// through a pager (unix.EBUSY), and block devices are refused. Of such an object what Sync has confirmed survives the death of the machine at any instant, and a page that the device has
// torn, or lost, is an error: emm.MemoryError, which [Region.Discard] of the page heals, with zeros. It takes up to twice the space, and Sync twice as long (see package pager/checked).
func (p *Pager) ObjectCreate(ctx context.Context, size int64, o *ObjectOptions) (*Object, error) {
	if err := p.begin(); err != nil {
		return nil, fmt.Errorf("create object: %w", err)
	}
	defer p.making.Done()
	return p.create(ctx, ipc.TypeObjectCreate, "create object", size, o)
}

// ObjectOpen takes up a send right received from elsewhere. A port that names no object, any more or ever, is emm.InvalidArgument. A Port is no right by
// itself: the object is gone with its last handle and mapping, even if a string of its port is on its way.
func (p *Pager) ObjectOpen(ctx context.Context, port emm.Port) (*Object, error) {
	if err := p.begin(); err != nil {
		return nil, fmt.Errorf("open object: %w", err)
	}
	defer p.making.Done()
	m, err := p.link.Call(ctx, ipc.TypeObjectOpen, ipc.ObjectOpen{Port: port}, &ipc.CallOptions{Late: p.lateObject})
	if err != nil {
		return nil, p.failed("open object", err)
	}
	return p.adopt("open object", m)
}

// Allocate makes a private object without a port and maps it (vm_allocate). The memory is gone with the Region.
func (p *Pager) Allocate(ctx context.Context, size int64, o *AllocateOptions) (*Region, error) {
	if o == nil {
		o = &AllocateOptions{}
	}
	if err := p.begin(); err != nil {
		return nil, fmt.Errorf("allocate: %w", err)
	}
	defer p.making.Done()
	object, err := p.create(ctx, ipc.TypeAllocate, "allocate", size, &o.ObjectOptions)
	if err != nil {
		return nil, err
	}
	defer object.Close() // the mapping holds the object from here on
	r, err := object.mapRegion(ctx, o.MapOptions)
	if err != nil {
		return nil, fmt.Errorf("allocate: %w", err)
	}
	return r, nil
}

func (p *Pager) create(ctx context.Context, t ipc.Type, what string, size int64, o *ObjectOptions) (*Object, error) {
	if o == nil {
		o = &ObjectOptions{}
	}
	if size < 0 || size == 0 && o.File == nil {
		return nil, invalid("%s: size %d, want 1 or more", what, size)
	}
	if n := o.PageSize; n != 0 && (n < MinPageSize || n > MaxPageSize || bits.OnesCount(uint(n)) != 1) {
		return nil, invalid("%s: page size %d, want a power of two from %d to %d", what, n, MinPageSize, MaxPageSize)
	}
	if n := o.ClusterSize; n < 0 || n > MaxPageSize || n != 0 && bits.OnesCount64(uint64(n)) != 1 {
		return nil, invalid("%s: cluster size %d, want a power of two up to %d", what, n, MaxPageSize)
	}
	if o.ResidentMin < 0 || o.ResidentMax < 0 {
		return nil, invalid("%s: resident minimum %d, maximum %d, want bytes or 0", what, o.ResidentMin, o.ResidentMax)
	}
	tail, err := ipc.AppendStrings(nil, o.Manager, o.Arg)
	if err != nil {
		return nil, invalid("%s: manager and argument: %w", what, err)
	}
	var m *ipc.Message
	call := func(fds ...int) {
		m, err = p.link.Call(ctx, t, ipc.ObjectCreate{Size: size, ClusterSize: o.ClusterSize, ResidentMin: o.ResidentMin, ResidentMax: o.ResidentMax, PageSize: uint32(o.PageSize)},
			&ipc.CallOptions{Tail: tail, FDs: fds, Late: p.lateObject})
	}
	if o.File == nil {
		call()
	} else {
		raw, rerr := o.File.SyscallConn() // unlike Fd it keeps the descriptor open across the call
		if rerr == nil {
			rerr = raw.Control(func(fd uintptr) { call(int(fd)) })
		}
		if rerr != nil {
			return nil, fmt.Errorf("%s: file %s: %w", what, o.File.Name(), rerr)
		}
	}
	if err != nil {
		return nil, p.failed(what, err)
	}
	return p.adopt(what, m)
}

// adopt makes an Object of a reply.
func (p *Pager) adopt(what string, m *ipc.Message) (*Object, error) {
	defer m.Close()
	r, _, err := ipc.Decode[ipc.ObjectReply](m.Body)
	if err == nil && (r.Size <= 0 || r.PageSize < MinPageSize || r.PageSize > MaxPageSize || bits.OnesCount32(r.PageSize) != 1) {
		err = fmt.Errorf("the pager says size %d, page size %d: %w", r.Size, r.PageSize, ipc.ErrMalformed)
	}
	if err != nil {
		return nil, p.failed(what, err)
	}
	o := &Object{pager: p, handle: r.Handle, port: (*emm.Port)(&r.Port), pageSize: int(r.PageSize), closed: make(chan struct{})}
	o.size.Store(r.Size)
	p.mu.Lock()
	p.objects[o] = struct{}{}
	p.mu.Unlock()
	return o, nil
}

// lateObject gives a right back that came after its caller had gone.
func (p *Pager) lateObject(m *ipc.Message) {
	if r, _, err := ipc.Decode[ipc.ObjectReply](m.Body); err == nil {
		p.undo(ipc.TypeObjectClose, ipc.ObjectClose{Handle: r.Handle})
	}
}

// undo makes a call whose failure changes nothing for anybody here: the pager cleans up after a task that goes.
func (p *Pager) undo(t ipc.Type, body any) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	m, err := p.link.Call(ctx, t, body, nil)
	if err == nil {
		m.Close()
	}
	return err
}

// Port is the object's port: whoever presents it has full access, so do not log it. Null for a private object.
func (o *Object) Port() emm.Port { return *o.port }

// Size is the object's size in bytes.
func (o *Object) Size() int64 { return o.size.Load() }

// PageSize is the size of the object's pages in bytes.
func (o *Object) PageSize() int { return o.pageSize }

// isClosed reports whether Close was called.
func (o *Object) isClosed() bool {
	select {
	case <-o.closed:
		return true
	default:
		return false
	}
}

// Pages tells the state of every page of the object (default_pager_object_pages), a moment ago. The result has one byte for each page.
func (o *Object) Pages(ctx context.Context) ([]Page, error) {
	n := (o.size.Load()-1)/int64(o.pageSize) + 1
	var pages []Page
	for int64(len(pages)) < n {
		if o.isClosed() {
			return nil, fmt.Errorf("list pages: %w", ErrClosed)
		}
		m, err := o.pager.link.Call(ctx, ipc.TypeObjectPages, ipc.ObjectPages{Handle: o.handle, Offset: int64(len(pages)) * int64(o.pageSize),
			Count: uint32(min(n-int64(len(pages)), ipc.MaxPages))}, nil)
		if err != nil {
			return nil, o.pager.failed("list pages", err)
		}
		_, tail, err := ipc.Decode[ipc.ObjectPagesReply](m.Body)
		m.Close()
		if err != nil {
			return nil, o.pager.failed("list pages", err)
		}
		if len(tail) == 0 {
			break // the object ends here
		}
		for _, b := range tail {
			pages = append(pages, Page(b))
		}
	}
	return pages, nil
}

// Close gives the right up. Mappings live on; the object is gone with its last right and mapping. Idempotent.
func (o *Object) Close() error {
	o.once.Do(func() {
		close(o.closed)
		o.pager.mu.Lock()
		delete(o.pager.objects, o)
		o.pager.mu.Unlock()
		err := o.pager.undo(ipc.TypeObjectClose, ipc.ObjectClose{Handle: o.handle})
		if errors.Is(err, ipc.ErrClosed) {
			err = nil // the whole Pager was closed: the right is gone
		}
		o.err = o.pager.failed("close object", err)
	})
	return o.err
}
