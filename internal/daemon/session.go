package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

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
	uc   *net.UnixConn // immutable; for its descriptor, which is the ipc.Conn's
	peer unix.Ucred    // immutable; who connected
	log  *slog.Logger  // immutable

	mu         sync.Mutex
	greeted    bool                // guarded by mu
	given      bool                // guarded by mu: a userfaultfd was handed over
	task       *vm.Task            // guarded by mu; nil: none yet
	fd         *uffd.FD            // guarded by mu; the task's, and the vm's to close
	lastHandle uint64              // guarded by mu
	handles    map[uint64]*object  // guarded by mu
	mappings   map[uint64]*mapping // guarded by mu
}

// mapping is one mapping and its way in and out. It is a right to its object.
type mapping struct {
	vm     *vm.Mapping // immutable
	object *object     // immutable

	mu      sync.Mutex
	started bool // guarded by mu; the guardian has the range
	closed  bool // guarded by mu
}

// guardianPatience bounds one call to the guardian.
const guardianPatience = 5 * time.Second

// serve serves one connection until it or ctx ends, and cleans up. ended, if not nil, is called in between.
func (d *Daemon) serve(ctx context.Context, uc *net.UnixConn, ended func()) {
	if ended == nil {
		ended = func() {}
	}
	end := sync.OnceFunc(ended)
	defer end()
	conn, err := ipc.NewConn(uc)
	if err != nil {
		uc.Close()
		return
	}
	s := &session{d: d, id: d.lastID.Add(1), uc: uc, handles: map[uint64]*object{}, mappings: map[uint64]*mapping{}}
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
	defer d.roster.enter(s)()
	link := ipc.NewLink(conn, &ipc.LinkOptions{Handler: s.handle, Log: s.log})
	stop := context.AfterFunc(ctx, link.Hangup)
	defer stop()
	<-link.Done()
	end()
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
	for _, m := range mappings {
		if m.started {
			live++
		}
	}
	if task != nil {
		task.Close() // with its mappings
		ctx, cancel := context.WithTimeout(context.Background(), guardianPatience)
		defer cancel()
		drop := s.d.guardian.DropTask
		if live > 0 {
			drop = s.d.guardian.EndTask
		}
		if err := drop(ctx, s.id); err != nil {
			s.log.Warn("task left", "err", err)
		}
	}
	for _, m := range mappings {
		m.vm.Close()
		s.d.release(m.object)
	}
	for _, o := range handles {
		s.d.release(o)
	}
	s.log.Info("task left", "mappings", len(mappings), "objects", len(handles))
}

// takeUffd begins to serve the faults that come in by raw.
func (s *session) takeUffd(ctx context.Context, q ipc.TaskUffd, raw int) error {
	if err := checkFeatures(raw, uffd.Features(q.Features)); err != nil {
		unix.Close(raw)
		return fmt.Errorf("take userfaultfd: %w", err)
	}
	s.mu.Lock()
	twice := s.given
	s.given = true
	s.mu.Unlock()
	if twice {
		unix.Close(raw)
		return fmt.Errorf("take userfaultfd: this connection has handed one over already: %w", emm.InvalidArgument)
	}
	err := s.putTask(ctx, raw)
	fd := uffd.FromFdNonblock(raw)
	var task *vm.Task
	if err == nil {
		task, err = s.d.vm.NewTask(fd, int(s.peer.Pid))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.dropTask() // the guardian may have it
		fd.Close()
		s.given = false
		return fmt.Errorf("take userfaultfd: %w", err)
	}
	s.task, s.fd = task, fd
	return nil
}

// putTask has the guardian hold the task's userfaultfd and socket.
func (s *session) putTask(ctx context.Context, raw int) error {
	rc, err := s.uc.SyscallConn()
	if err != nil {
		return err
	}
	perr := error(nil)
	err = rc.Control(func(socket uintptr) {
		perr = s.d.guardian.PutTask(ctx, s.id, fmt.Sprintf("session %d, pid %d", s.id, s.peer.Pid), raw, int(socket))
	})
	return errors.Join(perr, err)
}

// dropTask has the guardian forget the task.
func (s *session) dropTask() {
	ctx, cancel := context.WithTimeout(context.Background(), guardianPatience)
	defer cancel()
	if err := s.d.guardian.DropTask(ctx, s.id); err != nil {
		s.log.Warn("drop task", "err", err)
	}
}

// roomForHandle is an error if the connection has as many handles as it may. Requests that are served at the same time may go a little beyond.
func (s *session) roomForHandle() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return room("handles of this connection", len(s.handles), s.d.limits.handles)
}

// addHandle makes a number for a right.
func (s *session) addHandle(o *object) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastHandle++
	s.handles[s.lastHandle] = o
	return s.lastHandle
}

// object finds a handle's object, and makes a right for the request, to be released.
func (s *session) object(handle uint64) (*object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.handles[handle]
	if o == nil {
		return nil, fmt.Errorf("this connection has no handle %d: %w", handle, emm.InvalidName)
	}
	s.d.objects.retain(o)
	return o, nil
}

func (s *session) closeHandle(handle uint64) error {
	s.mu.Lock()
	o := s.handles[handle]
	delete(s.handles, handle)
	s.mu.Unlock()
	if o == nil {
		return fmt.Errorf("close object: this connection has no handle %d: %w", handle, emm.InvalidName)
	}
	s.d.release(o)
	return nil
}

// newMapping is the first half of vm_map.
func (s *session) newMapping(q ipc.Map) (*mapping, *os.File, error) {
	o, err := s.object(q.Handle)
	if err != nil {
		return nil, nil, fmt.Errorf("map object: %w", err)
	}
	s.mu.Lock()
	task, mappings := s.task, len(s.mappings)
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
	if err == nil && q.Flags&ipc.MapReadOnly == 0 && o.readOnly() {
		err = fmt.Errorf("map object: what is behind it can only be read: map it read-only (MapOptions.ReadOnly): %w", emm.ProtectionFailure)
	}
	var f *os.File
	m := &mapping{object: o} // the right that object made is the mapping's
	if err == nil {
		m.vm, f, err = task.NewMapping(o.vm, q.Offset, q.Size, q.Flags&ipc.MapReadOnly != 0)
	}
	if err != nil {
		s.d.release(o)
		return nil, nil, err
	}
	s.mu.Lock()
	s.mappings[m.vm.ID()] = m
	s.mu.Unlock()
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
func (s *session) start(ctx context.Context, q ipc.MapReady) error {
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
	if err := s.d.guardian.PutRange(context.WithoutCancel(ctx), s.id, m.vm.ID(), r); err != nil {
		return fmt.Errorf("start mapping: %w", err)
	}
	if err := m.vm.Start(r.Start); err != nil {
		s.dropRange(m)
		return err
	}
	m.started = true
	return nil
}

// unmap is vm_deallocate.
func (s *session) unmap(id uint64) error {
	s.mu.Lock()
	m := s.mappings[id]
	delete(s.mappings, id)
	s.mu.Unlock()
	if m == nil {
		return fmt.Errorf("unmap: this connection has no mapping %d: %w", id, emm.InvalidName)
	}
	m.mu.Lock()
	m.closed = true
	m.vm.Close()
	if m.started {
		s.dropRange(m)
	}
	m.mu.Unlock()
	s.d.release(m.object)
	return nil
}

func (s *session) dropRange(m *mapping) {
	ctx, cancel := context.WithTimeout(context.Background(), guardianPatience)
	defer cancel()
	if err := s.d.guardian.DropRange(ctx, m.vm.ID()); err != nil {
		s.log.Warn("unmap", "err", err) // a range too many does no harm
	}
}
