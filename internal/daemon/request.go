package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"machpager/internal/frames"
	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/uffd"
)

// Version of machpager, as Info tells it.
const Version = "0.1"

// handle serves one request of a task.
func (s *session) handle(ctx context.Context, m *ipc.Message) (ipc.Reply, error) {
	s.mu.Lock()
	greeted := s.greeted
	s.greeted = greeted || m.Type == ipc.TypeHello
	s.mu.Unlock()
	// The pager before this one may have answered the Hello.
	if greeted == (m.Type == ipc.TypeHello) && !m.Resent() && (greeted || !s.inherited()) {
		return ipc.Reply{}, fmt.Errorf("%v: a connection begins with one Hello: %w", m.Type, ipc.ErrMalformed)
	}
	if err := s.pace.wait(ctx, s.d.limits.taskRequests); err != nil {
		return ipc.Reply{}, err
	}
	switch m.Type {
	case ipc.TypeHello:
		return with(m, s.hello)
	case ipc.TypeTaskUffd:
		return empty(m, func(q ipc.TaskUffd) error { return s.takeUffd(q, m.TakeFD(0), m.Resent()) })
	case ipc.TypeObjectCreate, ipc.TypeAllocate:
		return s.create(ctx, m)
	case ipc.TypeObjectOpen:
		return s.open(m)
	case ipc.TypeObjectClose:
		return empty(m, func(q ipc.ObjectClose) error { return s.closeHandle(q.Handle, m.Resent()) })
	case ipc.TypeObjects:
		return with(m, s.list)
	case ipc.TypeObjectPages:
		return with(m, s.pages)
	case ipc.TypeMap:
		return s.mapObject(m)
	case ipc.TypeMapReady:
		return empty(m, func(q ipc.MapReady) error { return s.start(q, m.Resent()) })
	case ipc.TypeUnmap:
		return empty(m, func(q ipc.Unmap) error { return s.unmap(q.Mapping, m.Resent()) })
	case ipc.TypePopulate:
		return empty(m, func(q ipc.Populate) error { return s.populate(ctx, q) })
	case ipc.TypePageOut:
		return empty(m, func(q ipc.PageOut) error { return s.pageOut(ctx, q) })
	case ipc.TypeSync:
		return empty(m, func(q ipc.Sync) error { return s.sync(ctx, q) })
	case ipc.TypeAdvise:
		return empty(m, s.advise)
	case ipc.TypeWire:
		return with(m, func(q ipc.Wire) (ipc.Reply, error) { return s.wire(ctx, q, m.Header) })
	case ipc.TypeUnwire:
		return with(m, func(q ipc.Unwire) (ipc.Reply, error) { return s.unwire(q, m.Header) })
	case ipc.TypeDiscard:
		return empty(m, func(q ipc.Discard) error { return s.discard(ctx, q) })
	case ipc.TypeObjectSetSize:
		return empty(m, func(q ipc.ObjectSetSize) error { return s.setSize(ctx, q) })
	case ipc.TypeObjectSnapshot:
		return s.snapshot(ctx, m)
	case ipc.TypeObjectRight:
		return s.makeRight(m)
	case ipc.TypeObjectRevoke:
		return ipc.Reply{}, s.revoke(ctx, m)
	case ipc.TypeSetResident:
		return empty(m, func(q ipc.SetResident) error { return s.setResident(ctx, q) })
	case ipc.TypeBackingStoreCreate:
		return s.createBacking(m)
	case ipc.TypeBackingStoreDelete:
		return empty(m, func(q ipc.BackingStore) error { return s.deleteBacking(ctx, q, m.Resent()) })
	case ipc.TypeBackingStoreInfo:
		return with(m, s.nextBacking)
	case ipc.TypeFaultReason:
		return with(m, s.faultReason)
	case ipc.TypeRegionStats:
		return with(m, s.regionStats)
	case ipc.TypeDump:
		return s.dump()
	case ipc.TypeCheck:
		return s.check(ctx)
	case ipc.TypeUpgrade:
		return ipc.Reply{}, s.upgrade(ctx, m)
	case ipc.TypeInfo:
		return s.info()
	}
	return ipc.Reply{}, fmt.Errorf("%v: %w", m.Type, ipc.ErrUnknown)
}

// with decodes a request for f.
func with[T any](m *ipc.Message, f func(T) (ipc.Reply, error)) (ipc.Reply, error) {
	q, _, err := ipc.Decode[T](m.Body)
	if err != nil {
		return ipc.Reply{}, err
	}
	return f(q)
}

// empty is with for a request whose reply is Empty.
func empty[T any](m *ipc.Message, f func(T) error) (ipc.Reply, error) {
	return with(m, func(q T) (ipc.Reply, error) { return ipc.Reply{}, f(q) })
}

func (s *session) hello(q ipc.Hello) (ipc.Reply, error) {
	if q.Flags&^(ipc.HelloWantDevice|ipc.HelloUserModeOnly) != 0 {
		return ipc.Reply{}, fmt.Errorf("greet: unknown flags %#x: %w", q.Flags, emm.InvalidArgument)
	}
	r := ipc.Reply{Tail: []byte(s.d.tier.text), Body: ipc.HelloReply{Session: s.id, Features: uint64(uffd.RequiredFeatures), PagerPID: int32(os.Getpid()),
		GuardianPID: s.d.guardianPID(), Tier: uint32(s.d.tier.letter)}}
	if q.Flags&ipc.HelloWantDevice != 0 && s.d.device != nil {
		r.FDs = []int{int(s.d.device.Fd())}
	}
	return r, nil
}

// guardianPID is 0 when the guardian has gone.
func (d *Daemon) guardianPID() int32 {
	select {
	case <-d.guardian.Done():
		return 0
	default:
		return int32(os.Getppid())
	}
}

func (s *session) create(ctx context.Context, m *ipc.Message) (ipc.Reply, error) {
	q, tail, err := ipc.Decode[ipc.ObjectCreate](m.Body)
	if err != nil {
		return ipc.Reply{}, err
	}
	names, err := ipc.DecodeStrings(tail, 2)
	if err != nil {
		return ipc.Reply{}, fmt.Errorf("create object: manager and argument: %w", err)
	}
	if h, o := s.madeHandle(m); o != nil {
		return s.tell(h, o), nil
	}
	if err := s.roomForHandle(); err != nil {
		return ipc.Reply{}, fmt.Errorf("create object: %w", err)
	}
	if q.Flags != 0 || q.PageSize > 1<<30 {
		return ipc.Reply{}, fmt.Errorf("create object: flags %#x, page size %d: %w", q.Flags, q.PageSize, emm.InvalidArgument)
	}
	spec := objectSpec{size: q.Size, cluster: q.ClusterSize, pageSize: int(q.PageSize), residentMin: q.ResidentMin, residentMax: q.ResidentMax,
		private: m.Type == ipc.TypeAllocate, user: s.peer.Uid, manager: names[0], arg: names[1]}
	if m.NumFDs() == 1 {
		spec.file = os.NewFile(uintptr(m.TakeFD(0)), "of a task")
	}
	o, err := s.d.newObject(ctx, spec)
	if err != nil {
		return ipc.Reply{}, err
	}
	return s.handOut(o, m.Seq)
}

func (s *session) open(m *ipc.Message) (ipc.Reply, error) {
	q, _, err := ipc.Decode[ipc.ObjectOpen](m.Body)
	if err != nil {
		return ipc.Reply{}, err
	}
	if h, o := s.madeHandle(m); o != nil {
		return s.tell(h, o), nil
	}
	if err := s.roomForHandle(); err != nil {
		return ipc.Reply{}, fmt.Errorf("open object: %w", err)
	}
	o, r, err := s.d.objects.open(q.Port)
	if err != nil {
		return ipc.Reply{}, err
	}
	h, err := s.addHandle(o, r, m.Seq)
	if err != nil {
		return ipc.Reply{}, err
	}
	return s.tell(h, o), nil
}

// handOut gives the task a handle for a right that was made for it, by the request seq.
func (s *session) handOut(o *object, seq uint32) (ipc.Reply, error) {
	h, err := s.addHandle(o, nil, seq)
	if err != nil {
		return ipc.Reply{}, err
	}
	return s.tell(h, o), nil
}

// tell is what a task is told of a handle.
func (s *session) tell(h uint64, o *object) ipc.Reply {
	port := o.port
	if r := s.by(h); r != nil {
		port = r.port
	}
	return ipc.Reply{Body: ipc.ObjectReply{Handle: h, Size: o.size.Load(), Port: port, PageSize: uint32(o.vm.PageSize())}}
}

// listMost is how many objects one reply lists.
const listMost = 1000

func (s *session) list(q ipc.Objects) (ipc.Reply, error) {
	list, more := s.d.objects.after(q.After, listMost)
	entries := make([]ipc.ObjectEntry, 0, len(list))
	for _, o := range list {
		st := o.vm.Stats()
		e := ipc.ObjectEntry{ID: o.vm.ID(), Size: o.size.Load(), Resident: st.Resident * int64(o.vm.PageSize()), PageSize: uint32(o.vm.PageSize()), Mappings: uint32(st.Mappings)}
		for _, r := range s.d.storedRuns(o) {
			e.Stored += r.Size
		}
		entries = append(entries, e)
	}
	tail, err := ipc.AppendList(nil, entries)
	reply := ipc.ObjectsReply{}
	if more {
		reply.More = 1
	}
	return ipc.Reply{Body: reply, Tail: tail}, err
}

func (s *session) pages(q ipc.ObjectPages) (ipc.Reply, error) {
	o, err := s.object(q.Handle)
	if err != nil {
		return ipc.Reply{}, fmt.Errorf("list pages: %w", err)
	}
	defer s.d.release(o)
	ps := int64(o.vm.PageSize())
	if q.Offset < 0 || q.Offset%ps != 0 || q.Count > ipc.MaxPages {
		return ipc.Reply{}, fmt.Errorf("list pages: %d at %d: want at most %d, from a multiple of the page size %d on: %w", q.Count, q.Offset, ipc.MaxPages, ps,
			emm.InvalidArgument)
	}
	dst := make([]byte, q.Count)
	dst = dst[:o.vm.Pages(q.Offset, dst)]
	for _, r := range s.d.storedRuns(o) {
		first, end := (r.Off-q.Offset)/ps, (r.End()-q.Offset)/ps
		for i := max(first, 0); i < min(end, int64(len(dst))); i++ {
			dst[i] |= ipc.PageStored
		}
	}
	return ipc.Reply{Body: ipc.ObjectPagesReply{Offset: q.Offset, Count: uint32(len(dst))}, Tail: dst}, nil
}

func (s *session) mapObject(r *ipc.Message) (ipc.Reply, error) {
	q, _, err := ipc.Decode[ipc.Map](r.Body)
	if err != nil {
		return ipc.Reply{}, err
	}
	m, f, err := s.madeMapping(r)
	if m == nil && err == nil {
		m, f, err = s.newMapping(q, r.Seq)
	}
	if err != nil {
		return ipc.Reply{}, err
	}
	return ipc.Reply{Body: ipc.MapReply{Mapping: m.id, FileOffset: m.vm.Offset()}, FDs: []int{int(f.Fd())}, Done: func() { f.Close() }}, nil
}

// within checks a range of a mapping.
func (s *session) within(what string, id uint64, off, n int64) (*mapping, error) {
	m, err := s.mapping(id)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if ps := int64(m.object.vm.PageSize()); off < 0 || n < 0 || off%ps != 0 || n%ps != 0 || off > m.vm.Size()-n {
		return nil, fmt.Errorf("%s: %d bytes at %d: want whole pages of %d inside the mapping of %d: %w", what, n, off, ps, m.vm.Size(), emm.InvalidArgument)
	}
	return m, nil
}

func (s *session) populate(ctx context.Context, q ipc.Populate) error {
	m, err := s.within("populate", q.Mapping, q.Offset, q.Size)
	if err != nil {
		return err
	}
	if q.Flags&^ipc.PopulateWrite != 0 {
		return fmt.Errorf("populate: unknown flags %#x: %w", q.Flags, emm.InvalidArgument)
	}
	return m.vm.Populate(ctx, q.Offset, q.Size, q.Flags&ipc.PopulateWrite != 0)
}

func (s *session) pageOut(ctx context.Context, q ipc.PageOut) error {
	m, err := s.within("page out", q.Mapping, q.Offset, q.Size)
	if err != nil {
		return err
	}
	return m.object.vm.PageOut(ctx, m.vm.Offset()+q.Offset, q.Size)
}

func (s *session) sync(ctx context.Context, q ipc.Sync) error {
	m, err := s.within("sync", q.Mapping, q.Offset, q.Size)
	if err != nil {
		return err
	}
	return m.object.vm.Sync(ctx, m.vm.Offset()+q.Offset, q.Size)
}

func (s *session) faultReason(q ipc.FaultReason) (ipc.Reply, error) {
	m, err := s.mapping(q.Mapping)
	if err != nil {
		return ipc.Reply{}, fmt.Errorf("tell reason of a fault: %w", err)
	}
	if q.Offset < 0 || q.Offset >= m.vm.Size() {
		return ipc.Reply{}, fmt.Errorf("tell reason of a fault: offset %d of a mapping of %d: %w", q.Offset, m.vm.Size(), emm.InvalidArgument)
	}
	var r ipc.FaultReasonReply
	why := m.vm.FaultReason(q.Offset)
	if why == nil {
		return ipc.Reply{Body: r}, nil
	}
	kern, errno := emm.MemoryError, unix.Errno(0)
	errors.As(why, &kern)
	errors.As(why, &errno)
	r.Reason, r.Errno = int32(kern), int32(errno)
	return ipc.Reply{Body: r, Tail: []byte(why.Error())}, nil
}

func (s *session) regionStats(q ipc.RegionStats) (ipc.Reply, error) {
	m, err := s.mapping(q.Mapping)
	if err != nil {
		return ipc.Reply{}, fmt.Errorf("tell statistics: %w", err)
	}
	st, ps := m.vm.Stats(), int64(m.object.vm.PageSize())
	n := st.ZeroFilled + st.Stored + st.Minor + st.WriteProtect + st.Errors
	return ipc.Reply{Body: ipc.RegionStatsReply{ZeroFilled: uint64(st.ZeroFilled), Stored: uint64(st.Stored), Minor: uint64(st.Minor),
		WriteProtect: uint64(st.WriteProtect), Errors: uint64(st.Errors), PagesIn: uint64(st.PagesIn), PagesOut: uint64(m.object.vm.Stats().Returned),
		Resident: st.Resident * ps, Dirty: st.Dirty * ps,
		Latency: ipc.Latency{Count: uint64(n), P50: uint64(st.P50), P99: uint64(st.P99), Max: uint64(st.Max)}}}, nil
}

func (s *session) info() (ipc.Reply, error) {
	d := s.d
	st, space := d.vm.Stats(), d.pager.Info()
	r := ipc.InfoReply{MinPageSize: 4096, MaxPageSize: 2 << 20, Budget: d.frames.Budget(), Resident: d.frames.Reserved() * frames.PageSize, KernelResident: -1,
		PagingTotal: space.Total, PagingFree: space.Free, Tasks: uint32(st.Tasks), Objects: uint32(d.objects.len()), Mappings: uint32(st.Mappings),
		Tier: uint32(d.tier.letter), PagerPID: int32(os.Getpid()), GuardianPID: d.guardianPID()}
	if n, err := d.frames.Usage(); err == nil {
		r.KernelResident = n
	}
	tail, err := ipc.AppendStrings(nil, d.frames.Kind().String(), d.tier.text, kernelRelease(), Version, d.confinement, d.limits.text())
	return ipc.Reply{Body: r, Tail: tail}, err
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}
