//go:build linux

package region

import (
	"context"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/uffd"
)

// hugeSize is the extent that address and offset in the object agree on, so that the kernel can map it as one.
const hugeSize = 2 << 20

// MapOptions are the options of Map. nil and zero values mean the defaults.
type MapOptions struct {
	Offset   int64 // first byte of the object, not necessarily at a page's start; 0 for Allocate's usual case
	Size     int64 // bytes; 0: to the end of the object
	ReadOnly bool  // the memory can only be read; writing is a fault with emm.ProtectionFailure
}

// Map maps a part of the object into this process (vm_map). It returns when the memory is registered and the object is ready; nothing
// is read yet. Errors: emm.InvalidArgument for a range outside the object, emm.InvalidObject for an object destroyed meanwhile, EPERM (with what helps) where
// this task may not use userfaultfd, ENOMEM.
func (o *Object) Map(ctx context.Context, m *MapOptions) (*Region, error) {
	if m == nil {
		m = &MapOptions{}
	}
	if err := o.pager.begin(); err != nil {
		return nil, fmt.Errorf("map object: %w", err)
	}
	defer o.pager.making.Done()
	r, err := o.mapRegion(ctx, *m)
	if err != nil {
		return nil, fmt.Errorf("map object: %w", err)
	}
	return r, nil
}

func (o *Object) mapRegion(ctx context.Context, m MapOptions) (*Region, error) {
	if o.isClosed() {
		return nil, ErrClosed
	}
	if m.Size == 0 {
		m.Size = o.size.Load() - m.Offset
	}
	if m.Offset < 0 || m.Size <= 0 || m.Offset > o.size.Load() || m.Size > o.size.Load()-m.Offset {
		return nil, invalid("offset %d and size %d, the object has %d bytes", m.Offset, m.Size, o.size.Load())
	}
	p, page := o.pager, int64(o.pageSize)
	fd, err := p.taskUffd(ctx)
	if err != nil {
		return nil, err
	}
	r := &Region{pager: p, fd: fd, readOnly: m.ReadOnly, pageSize: page, size: m.Size, delta: m.Offset & (page - 1)}
	r.ctx, r.cancel = context.WithCancelCause(context.Background())
	start := m.Offset - r.delta
	length := (r.delta + m.Size + page - 1) &^ (page - 1) // the object's last page reaches past its size, not past its file

	flags := uint32(0)
	if m.ReadOnly {
		flags = ipc.MapReadOnly
	}
	reply, err := p.link.Call(ctx, ipc.TypeMap, ipc.Map{Handle: o.handle, Offset: start, Size: length, Flags: flags},
		&ipc.CallOptions{Late: p.lateMap})
	if err != nil {
		return nil, p.failed("ask the pager", err)
	}
	defer reply.Close() // closes the object's file: user code never holds it
	mr, _, err := ipc.Decode[ipc.MapReply](reply.Body)
	if err != nil {
		return nil, p.failed("ask the pager", err)
	}
	r.id = mr.Mapping
	if r.mem, err = reserve(length, start); err != nil {
		p.undo(ipc.TypeUnmap, ipc.Unmap{Mapping: r.id})
		return nil, fmt.Errorf("reserve %d bytes of address space: %w", length, err)
	}
	// From here on Close undoes everything.
	if err := r.establish(ctx, reply.FD(0), mr.FileOffset); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// establish makes memory of the reserved range. It stays PROT_NONE until the pager has acknowledged it: a touch before that would be a page of
// zeros, or of whatever lies in the file.
func (r *Region) establish(ctx context.Context, file int, offset int64) error {
	p := r.pager
	share, mode, prot := unix.MAP_SHARED, uffd.RegisterMissing|uffd.RegisterMinor|uffd.RegisterWP, unix.PROT_READ|unix.PROT_WRITE
	if r.readOnly {
		// A shared mapping of a file open for reading cannot be registered. A private one sees the shared pages as long as nobody copies into it.
		share, mode, prot = unix.MAP_PRIVATE, uffd.RegisterMissing|uffd.RegisterMinor, unix.PROT_READ
	}
	base := unsafe.Pointer(unsafe.SliceData(r.mem))
	if _, err := unix.MmapPtr(file, offset, base, uintptr(len(r.mem)), unix.PROT_NONE, share|unix.MAP_FIXED); err != nil {
		return fmt.Errorf("map the object's file: %w", err)
	}
	if err := unix.Madvise(r.mem, unix.MADV_DONTFORK); err != nil {
		return fmt.Errorf("keep the mapping from forked children (MADV_DONTFORK): %w", err)
	}
	// khugepaged charges a whole folio for a moment and then gives up, since the range is registered: frames that the budget seems to lack. An error
	// means a kernel without huge pages.
	unix.Madvise(r.mem, unix.MADV_NOHUGEPAGE)
	if _, err := r.fd.Register(r.address(), uint64(len(r.mem)), mode); err != nil {
		return fmt.Errorf("register the mapping: %w", err)
	}
	// Known before its faults are served, so that the end of the pager at any moment finds it.
	p.mu.Lock()
	p.regions[r] = struct{}{}
	p.mu.Unlock()
	mapped.add(r)
	m, err := p.link.Call(ctx, ipc.TypeMapReady, ipc.MapReady{Mapping: r.id, Address: r.address()}, nil)
	if err != nil {
		return p.failed("tell the pager that the mapping is ready", err)
	}
	m.Close()
	if err := unix.Mprotect(r.mem, prot); err != nil {
		return fmt.Errorf("make the mapping accessible: %w", err)
	}
	return nil
}

// lateMap gives a mapping back that came after its caller had gone.
func (p *Pager) lateMap(m *ipc.Message) {
	if r, _, err := ipc.Decode[ipc.MapReply](m.Body); err == nil {
		p.undo(ipc.TypeUnmap, ipc.Unmap{Mapping: r.Mapping})
	}
}

// reserve finds inaccessible address space of size bytes; with 2 MiB or more, it agrees with offset modulo 2 MiB.
func reserve(size, offset int64) ([]byte, error) {
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
	slack := int64(0)
	if size >= hugeSize {
		slack = hugeSize
	}
	if size+slack < size || int64(uintptr(size+slack)) != size+slack {
		return nil, unix.ENOMEM
	}
	base, err := unix.MmapPtr(-1, 0, nil, uintptr(size+slack), unix.PROT_NONE, flags)
	if err != nil {
		return nil, err
	}
	if slack == 0 {
		return unsafe.Slice((*byte)(base), size), nil
	}
	head := (offset - int64(uintptr(base))) & (hugeSize - 1)
	start := unsafe.Add(base, head)
	if head > 0 {
		err = unix.MunmapPtr(base, uintptr(head))
	}
	if tail := slack - head; err == nil && tail > 0 {
		err = unix.MunmapPtr(unsafe.Add(start, size), uintptr(tail))
	}
	if err != nil { // the kernel's limit of mappings: what is left of it is one mapping, or two
		unix.MunmapPtr(base, uintptr(size+slack))
		return nil, err
	}
	return unsafe.Slice((*byte)(start), size), nil
}
