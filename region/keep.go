//go:build linux

package region

import (
	"context"

	"machpager/internal/ipc"
)

// Advice is how a range will be used (Mach: vm_behavior_t, Linux: madvise(2)).
type Advice uint32

// The advice there is. The first four stay with the range until other advice is given, and end with the Region; the last two do something once.
const (
	Normal            Advice = iota // find out from the faults: the default
	Random                          // no read-ahead
	Sequential                      // read far ahead; what lies behind goes first
	ReverseSequential               // the same downwards
	WillNeed                        // read now, in the background, as far as there are free frames
	DontNeed                        // these pages go first; their contents are kept
)

// Advise says how a range will be used (vm_behavior_set); bytes, rounded outward to pages. It changes no contents and is never needed. At most 256 ranges
// of a Region have advice of their own: emm.ResourceShortage beyond.
func (r *Region) Advise(ctx context.Context, off, n int64, a Advice) error {
	if a > DontNeed {
		return invalid("advise: unknown advice %d", a)
	}
	first, size, err := r.pages("advise", off, n)
	if err != nil || n == 0 {
		return err
	}
	return r.tell(ctx, "advise", ipc.TypeAdvise, ipc.Advise{Mapping: r.id, Offset: first, Size: size, Advice: uint32(a)})
}

// Wire makes a range resident, and writable unless the Region is read-only, and keeps it so until as many Unwires or the end of the Region (vm_wire); bytes, rounded
// outward to pages. Memory that the kernel or a device pins (O_DIRECT, io_uring registered buffers, RDMA) must be wired first: page-out cannot see pins. Errors:
// emm.ResourceShortage if the budget would be all wired, and those of Populate.
func (r *Region) Wire(ctx context.Context, off, n int64) error {
	first, size, err := r.pages("wire", off, n)
	if err != nil || n == 0 {
		return err
	}
	return r.tell(ctx, "wire", ipc.TypeWire, ipc.Wire{Mapping: r.id, Offset: first, Size: size})
}

// Unwire takes one Wire of a range back; bytes, rounded outward to pages. A page that this Region has not wired is emm.InvalidArgument, and then no page is
// unwired.
func (r *Region) Unwire(ctx context.Context, off, n int64) error {
	first, size, err := r.pages("unwire", off, n)
	if err != nil || n == 0 {
		return err
	}
	return r.tell(ctx, "unwire", ipc.TypeUnwire, ipc.Unwire{Mapping: r.id, Offset: first, Size: size})
}

// Discard throws away the contents of the whole pages inside a range, for every task that maps the object: they read as zeros again, and what the manager has
// stored of them is freed. Bytes, rounded inward to pages; for an object over a file the file has zeros there. Wired pages are emm.InvalidArgument, a read-only
// Region emm.ProtectionFailure. Where the manager cannot forget, the pages keep their contents, and Discard says so. What others write to the range before Discard
// returns may be thrown away, even if they have seen zeros there: a pager that dies meanwhile leaves it to the next one to begin anew.
func (r *Region) Discard(ctx context.Context, off, n int64) error {
	if _, _, err := r.pages("discard", off, n); err != nil {
		return err
	}
	first := (r.delta + off + r.pageSize - 1) &^ (r.pageSize - 1)
	end := (r.delta + off + n) &^ (r.pageSize - 1)
	if first >= end {
		return nil
	}
	return r.tell(ctx, "discard", ipc.TypeDiscard, ipc.Discard{Mapping: r.id, Offset: first, Size: end - first})
}

// tell is a call without an answer but its success.
func (r *Region) tell(ctx context.Context, what string, t ipc.Type, body any) error {
	m, err := r.call(ctx, what, t, body)
	if err != nil {
		return err
	}
	m.Close()
	return nil
}

// SetSize makes the object n bytes long, at most what it was made with (default_pager_object_set_size); the pager rounds up to whole pages. Growing is free. What lies
// beyond a smaller size is discarded, and a touch there is a memory error until the object grows again: then it reads as zeros.
func (o *Object) SetSize(ctx context.Context, n int64) error {
	if o.isClosed() {
		return o.pager.failed("set size of object", ErrClosed)
	}
	m, err := o.pager.link.Call(ctx, ipc.TypeObjectSetSize, ipc.ObjectSetSize{Handle: o.handle, Size: n}, nil)
	if err != nil {
		return o.pager.failed("set size of object", err)
	}
	m.Close()
	o.size.Store(n)
	return nil
}

// SetResident changes the budget: the bytes of memory that all objects together may occupy. A smaller one is in force when SetResident returns: pages were
// paged out first. For the pager's own user and root; unix.EPERM for others.
func (p *Pager) SetResident(ctx context.Context, bytes int64) error {
	if err := p.begin(); err != nil {
		return err
	}
	defer p.making.Done()
	m, err := p.link.Call(ctx, ipc.TypeSetResident, ipc.SetResident{Bytes: bytes}, nil)
	if err != nil {
		return p.failed("set the budget", err)
	}
	m.Close()
	return nil
}

// Upgrade has the guardian replace the pager by one of the program that is installed now, on the same state: tasks notice a pause. It returns when the new one
// serves. If the new program cannot take over, the old pager stays and the error says why. For the pager's own user and root; unix.EPERM for others. A pager
// that a program started for itself cannot be upgraded: it ends with the program.
func (p *Pager) Upgrade(ctx context.Context) error {
	if err := p.begin(); err != nil {
		return err
	}
	defer p.making.Done()
	m, err := p.link.Call(ctx, ipc.TypeUpgrade, nil, nil)
	if err != nil {
		return p.failed("upgrade", err)
	}
	m.Close()
	return nil
}
