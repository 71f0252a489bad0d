package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/internal/vm"
	"machpager/pager/emm"
	"machpager/uffd"
)

// session is one connection: a task, and what it holds.
type session struct {
	d    *Daemon       // immutable
	id   uint64        // immutable
	own  bool          // immutable; of the task that this pager belongs to
	uc   *net.UnixConn // immutable; for its descriptor, which is the ipc.Conn's
	peer unix.Ucred    // immutable; who connected
	log  *slog.Logger  // immutable
	pace pace

	// Of one that was taken over, until it is served.
	conn    *ipc.Conn
	leave   func()
	spoiled bool // a mapping is not served: the guardian answers for the task

	// What requests that the pager before this one had served have made, by their seq: they may come again. Immutable.
	madeHandles  map[uint32]uint64
	madeMappings map[uint32]*mapping

	mu       sync.Mutex
	greeted  bool                // guarded by mu
	given    bool                // guarded by mu: a userfaultfd was handed over
	task     *vm.Task            // guarded by mu; nil: none yet
	fd       *uffd.FD            // guarded by mu; the task's, and the vm's to close
	handles  map[uint64]*object  // guarded by mu
	rights   map[uint64]*right   // guarded by mu; of handles that give less than the full right
	mappings map[uint64]*mapping // guarded by mu; by the number that the task knows
}

// inherited reports whether the session began with an earlier pager.
func (s *session) inherited() bool { return s.madeHandles != nil }

// mapping is one mapping and its way in and out. It is a right to its object.
type mapping struct {
	vm      *vm.Mapping // immutable
	id      uint64      // immutable; as the task knows it
	session uint64      // immutable
	seq     uint32      // immutable; of the request that made it
	object  *object     // immutable
	right   *right      // immutable; that it was made by; nil: the full one
	wires   wires

	mu      sync.Mutex
	record  mappingRecord // guarded by mu
	started bool          // guarded by mu; the guardian has the range
	addr    uint64        // guarded by mu; where the task said that it is
	closed  bool          // guarded by mu
}

// guardianPatience bounds one call to the guardian.
const guardianPatience = 5 * time.Second

// serve serves one new connection until it or ctx ends, and cleans up. own says that it is that of the task that this pager belongs to: ended is called when it has
// ended, before the cleaning up. restarted is for a connection from which a dead pager may have read.
func (d *Daemon) serve(ctx context.Context, uc *net.UnixConn, own bool, restarted *ipc.Restarted, ended func()) {
	defer ended()
	conn, err := ipc.NewConn(uc)
	if err != nil {
		uc.Close()
		return
	}
	s := &session{d: d, id: d.lastID.Add(1), own: own, uc: uc, handles: map[uint64]*object{}, rights: map[uint64]*right{}, mappings: map[uint64]*mapping{}}
	if s.peer, err = conn.Peer(); err != nil {
		conn.Close()
		d.log.Warn("task refused: nobody knows who it is", "err", err)
		return
	}
	leave, told, err := d.limits.enter(s.peer.Uid)
	defer leave()
	if err != nil {
		d.log.Warn("task refused", "pid", s.peer.Pid, "uid", s.peer.Uid, "err", err)
		if told {
			refuse(uc, err)
		} else {
			conn.Close()
		}
		return
	}
	s.log = d.log.With("session", s.id, "pid", s.peer.Pid, "uid", s.peer.Uid)
	s.log.Info("task connected")
	if err := s.holdSocket(); err != nil {
		s.log.Error("the guardian does not hold the connection: it would not outlive this pager", "err", err)
	}
	failpoint.Here("daemon.session.held")
	s.run(ctx, conn, restarted, ended)
}

// run serves the connection of the session until it or ctx ends, and cleans up.
func (s *session) run(ctx context.Context, conn *ipc.Conn, restarted *ipc.Restarted, ended func()) {
	defer s.d.roster.enter(s)()
	link := ipc.NewLink(conn, &ipc.LinkOptions{Handler: s.handle, Log: s.log, Restarted: restarted})
	stop := context.AfterFunc(ctx, link.Hangup)
	defer stop()
	<-link.Done()
	ended()
	link.Close() // waits for the requests that are being served
	if err := link.Err(); !errors.Is(err, ipc.ErrGone) && !errors.Is(err, ipc.ErrClosed) {
		s.log.Warn("connection broken", "err", err)
	}
	s.close()
}

// close gives up all that the connection held. No request is being served any more.
func (s *session) close() {
	s.mu.Lock()
	task, handles, mappings := s.task, s.handles, s.mappings
	s.handles, s.mappings = nil, nil
	s.mu.Unlock()
	live := 0
	if s.spoiled {
		live++
	}
	for _, m := range mappings {
		if m.started {
			live++
		}
	}
	if task != nil {
		task.Close() // with its mappings
	}
	if live > 0 {
		if err := s.d.hold(guardian.Item{Kind: ipc.ItemEnd, ID: s.id}); err != nil {
			s.log.Warn("task left", "err", err)
		}
	} else {
		s.d.letGo(ipc.ItemTask, s.id) // with its socket
	}
	failpoint.Here("daemon.session.left")
	for _, m := range mappings {
		s.end(m)
	}
	for h, o := range handles {
		s.d.letGo(ipc.ItemHandle, h)
		s.d.release(o)
	}
	s.log.Info("task left", "mappings", len(mappings), "objects", len(handles))
}

// takeUffd begins to serve the faults that come in by raw.
func (s *session) takeUffd(q ipc.TaskUffd, raw int, resent bool) error {
	if err := checkFeatures(raw, uffd.Features(q.Features)); err != nil {
		unix.Close(raw)
		return fmt.Errorf("take userfaultfd: %w", err)
	}
	s.mu.Lock()
	twice := s.given
	s.given = true
	s.mu.Unlock()
	if twice && resent {
		unix.Close(raw)
		return nil // the one before this pager had taken it
	}
	if twice {
		unix.Close(raw)
		return fmt.Errorf("take userfaultfd: this connection has handed one over already: %w", emm.InvalidArgument)
	}
	err := s.d.hold(guardian.Item{Kind: ipc.ItemTask, ID: s.id, Tail: fmt.Appendf(nil, "session %d, pid %d", s.id, s.peer.Pid), FD: raw})
	failpoint.Here("daemon.task.held")
	fd := uffd.FromFdNonblock(raw)
	var task *vm.Task
	if err == nil {
		task, err = s.d.vm.NewTask(fd, int(s.peer.Pid))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.d.letGo(ipc.ItemTask, s.id) // the guardian may have it
		s.holdSocket()                // which went with it
		fd.Close()
		s.given = false
		return fmt.Errorf("take userfaultfd: %w", err)
	}
	s.task, s.fd = task, fd
	return nil
}

// holdSocket has the guardian hold the connection.
func (s *session) holdSocket() error {
	i := guardian.Item{Kind: ipc.ItemSocket, ID: s.id}
	if s.own {
		i.A = 1
	}
	return withFD(s.uc, func(fd int) error {
		i.FD = fd
		return s.d.hold(i)
	})
}

// withFD calls fn with a socket's descriptor, which stays open meanwhile.
func withFD(c syscall.Conn, fn func(fd int) error) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	ferr := error(nil)
	err = rc.Control(func(fd uintptr) { ferr = fn(int(fd)) })
	return errors.Join(ferr, err)
}

// roomForHandle is an error if the connection has as many handles as it may. Requests that are served at the same time may go a little beyond.
func (s *session) roomForHandle() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return room("handles of this connection", len(s.handles), s.d.limits.handles)
}

// addHandle makes a number for a right, by the request seq; r is nil for the full right. On an error the right is given up.
func (s *session) addHandle(o *object, r *right, seq uint32) (uint64, error) {
	h, err := s.d.number()
	if err == nil {
		i := guardian.Item{Kind: ipc.ItemHandle, ID: h, Parent: s.id, A: o.vm.ID(), B: uint64(seq)}
		if r != nil {
			i.Tail = []byte(r.port.String())
		}
		err = s.d.hold(i)
	}
	if err != nil {
		s.d.release(o)
		return 0, err
	}
	failpoint.Here("daemon.handle.held")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handles[h] = o
	if r != nil {
		s.rights[h] = r
	}
	return h, nil
}

// madeHandle is what a request that came again had made when it came first; 0: nothing that is left.
func (s *session) madeHandle(m *ipc.Message) (handle uint64, o *object) {
	if !m.Resent() {
		return 0, nil
	}
	handle = s.madeHandles[m.Seq]
	s.mu.Lock()
	defer s.mu.Unlock()
	if o = s.handles[handle]; o == nil {
		return 0, nil
	}
	return handle, o
}

// object finds a handle's object, and makes a right for the request, to be released.
func (s *session) object(handle uint64) (*object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.handles[handle]
	if o == nil {
		return nil, fmt.Errorf("this connection has no handle %d: %w", handle, emm.InvalidName)
	}
	if err := s.rights[handle].allows(0); err != nil {
		return nil, err
	}
	s.d.objects.retain(o)
	return o, nil
}

// closeHandle gives a handle up. One that is not there was given up before, if the request was resent.
func (s *session) closeHandle(handle uint64, resent bool) error {
	s.mu.Lock()
	o := s.handles[handle]
	delete(s.handles, handle)
	delete(s.rights, handle)
	s.mu.Unlock()
	if o == nil && resent {
		return nil
	}
	if o == nil {
		return fmt.Errorf("close object: this connection has no handle %d: %w", handle, emm.InvalidName)
	}
	s.d.letGo(ipc.ItemHandle, handle)
	failpoint.Here("daemon.close.dropped")
	s.d.release(o)
	return nil
}

// newMapping is the first half of vm_map, for the request seq.
func (s *session) newMapping(q ipc.Map, seq uint32) (*mapping, *os.File, error) {
	o, err := s.object(q.Handle)
	if err != nil {
		return nil, nil, fmt.Errorf("map object: %w", err)
	}
	s.mu.Lock()
	task, mappings, by := s.task, len(s.mappings), s.rights[q.Handle]
	s.mu.Unlock()
	ps := int64(o.vm.PageSize())
	switch {
	case task == nil:
		err = fmt.Errorf("map object: no userfaultfd was handed over: %w", emm.InvalidTask)
	case q.Flags&^ipc.MapReadOnly != 0:
		err = fmt.Errorf("map object: unknown flags %#x: %w", q.Flags, emm.InvalidArgument)
	case q.Offset < 0 || q.Size <= 0 || q.Offset%ps != 0 || q.Size%ps != 0 || q.Offset > o.vm.Size()-q.Size:
		err = fmt.Errorf("map object: %d bytes at %d: want whole pages of %d inside the object of %d: %w", q.Size, q.Offset, ps, o.vm.Size(), emm.InvalidArgument)
	}
	if tooMany := room("mappings of this connection", mappings, s.d.limits.mappings); err == nil && tooMany != nil {
		err = fmt.Errorf("map object: %w", tooMany)
	}
	if err == nil {
		if beyond := s.roomToMap(q.Size); beyond != nil {
			err = fmt.Errorf("map object: %w", beyond)
		}
	}
	if err == nil && q.Flags&ipc.MapReadOnly == 0 && o.readOnly() {
		err = fmt.Errorf("map object: what is behind it can only be read: map it read-only (MapOptions.ReadOnly): %w", emm.ProtectionFailure)
	}
	if denied := by.allows(ipc.RightReadOnly); err == nil && denied != nil && q.Flags&ipc.MapReadOnly == 0 {
		err = fmt.Errorf("map object: %w", denied)
	}
	var f *os.File
	// The right that object made is the mapping's.
	m := &mapping{object: o, right: by, session: s.id, seq: seq, record: mappingRecord{Offset: q.Offset, Size: q.Size, ReadOnly: q.Flags&ipc.MapReadOnly != 0}}
	if by != nil {
		m.record.Right = by.port.String()
	}
	if err == nil {
		m.id, err = s.d.number()
	}
	if err == nil {
		m.vm, f, err = task.NewMapping(o.vm, q.Offset, q.Size, m.record.ReadOnly)
	}
	if err == nil {
		failpoint.Here("daemon.map.made")
		if err = m.hold(s.d); err != nil {
			m.vm.Close()
			f.Close()
		}
	}
	if err != nil {
		s.d.release(o)
		return nil, nil, err
	}
	failpoint.Here("daemon.map.held")
	s.addMapping(m)
	return m, f, nil
}

func (s *session) addMapping(m *mapping) {
	s.d.mappings.Store(m.vm.ID(), m)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mappings[m.id] = m
	if m.right.allows(0) != nil {
		m.vm.Close() // taken back meanwhile
	}
}

// madeMapping is what a Map that came again had made when it came first, with the file once more; nil: nothing that is left.
func (s *session) madeMapping(r *ipc.Message) (*mapping, *os.File, error) {
	if !r.Resent() {
		return nil, nil, nil
	}
	m := s.madeMappings[r.Seq]
	if m == nil {
		return nil, nil, nil
	}
	if _, err := s.mapping(m.id); err != nil {
		return nil, nil, nil
	}
	open := m.object.vm.File().Dup
	if m.vm.ReadOnly() {
		open = m.object.vm.File().ReadOnly
	}
	f, err := open()
	if err != nil {
		return nil, nil, fmt.Errorf("map object: hand out its file: %w", err)
	}
	return m, f, nil
}

func (s *session) mapping(id uint64) (*mapping, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.mappings[id]
	if m == nil {
		return nil, fmt.Errorf("this connection has no mapping %d: %w", id, emm.InvalidName)
	}
	return m, nil
}

// start is the second half of vm_map.
func (s *session) start(q ipc.MapReady, resent bool) error {
	m, err := s.mapping(q.Mapping)
	if err != nil {
		return fmt.Errorf("start mapping: %w", err)
	}
	r := guardian.Range{Start: q.Address, Len: uint64(m.vm.Size())}
	if r.Start == 0 || r.Start%4096 != 0 || r.Start >= 1<<63 {
		return fmt.Errorf("start mapping: address %#x: want a multiple of 4096: %w", r.Start, emm.InvalidAddress)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if resent && m.started && m.addr == r.Start {
		return nil
	}
	if m.started || m.closed {
		return fmt.Errorf("start mapping %d: it was started or ended before: %w", q.Mapping, emm.InvalidArgument)
	}
	s.mu.Lock()
	fd := s.fd
	s.mu.Unlock()
	if err := s.d.probe.registered(fd, r, m.vm.ReadOnly()); err != nil {
		return fmt.Errorf("start mapping: %w", err)
	}
	// From here on the range is the guardian's to answer for, whatever happens to the request.
	if err := s.d.hold(guardian.Item{Kind: ipc.ItemRange, ID: m.id, Parent: s.id, A: r.Start, B: r.Len}); err != nil {
		return fmt.Errorf("start mapping: %w", err)
	}
	failpoint.Here("daemon.ready.held")
	if err := m.vm.Start(r.Start); err != nil {
		s.d.letGo(ipc.ItemRange, m.id)
		return err
	}
	failpoint.Here("daemon.ready.started")
	m.started, m.addr = true, r.Start
	return nil
}

// unmap is vm_deallocate. A mapping that is not there has ended before, if the request was resent.
func (s *session) unmap(id uint64, resent bool) error {
	s.mu.Lock()
	m := s.mappings[id]
	delete(s.mappings, id)
	s.mu.Unlock()
	if m == nil && resent {
		return nil
	}
	if m == nil {
		return fmt.Errorf("unmap: this connection has no mapping %d: %w", id, emm.InvalidName)
	}
	s.end(m)
	return nil
}

// end ends a mapping that nobody can find any more.
func (s *session) end(m *mapping) {
	m.mu.Lock()
	m.closed = true
	m.vm.Close()
	failpoint.Here("daemon.unmap.closed")
	if m.started {
		s.d.letGo(ipc.ItemRange, m.id)
	}
	failpoint.Here("daemon.unmap.range")
	m.wires.drop(s.d, m.id)
	s.d.letGo(ipc.ItemMapping, m.id)
	m.mu.Unlock()
	failpoint.Here("daemon.unmap.dropped")
	s.d.mappings.Delete(m.vm.ID())
	s.d.release(m.object)
}
