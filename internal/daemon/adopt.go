package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"machpager/internal/failpoint"
	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/internal/vm"
	"machpager/pager/emm"
	"machpager/pager/store/file"
	"machpager/pager/store/files"
	"machpager/uffd"
)

// Adoption: this pager takes the place of one that died at any instruction. What it left is with the guardian: hold.go says what. The order is
//
//	settings, frames, memory by name, store, default pager     as at any start, on what is there
//	objects, with their managers                               adoptObject
//	sessions: sockets, tasks, handles, mappings, wirings       adoptSession
//	what belongs to nothing is dropped                         dropOrphans
//	confinement                                                as at any start
//	the vm goes on: every waiting thread is woken              resume
//	Ready; the socket is listened at; Restarted on each link   Run
//
// A pager that dies in here leaves the same to the next one, a little tidier: adoption undoes nothing that somebody has heard of. An error that another pager
// would meet too ends the process with guardian.ExitState.

// ErrState says that what an earlier pager left cannot be understood: no other pager of this program can take over either.
var ErrState = errors.New("what the pager before this one left cannot be read")

// inheritance is what an earlier pager left, sorted. The descriptors are its own until somebody takes them.
type inheritance struct {
	began        time.Time
	mount        *os.File     // nil: frames are memory files
	listener     *os.File     // nil: it listened nowhere
	paging       []files.File // with their files
	frames       map[uint64]*guardian.Item
	managerFiles map[uint64]*guardian.Item
	objects      []guardian.Item
	sockets      []guardian.Item
	tasks        map[uint64]*guardian.Item
	handles      map[uint64][]guardian.Item // by session
	mappings     map[uint64][]guardian.Item // by session
	ranges       map[uint64]guardian.Item
	wires        map[uint64]guardian.Item

	taken   []*session
	byID    map[uint64]*object
	shrunk  []*object // whose sizeMu is held until what lies beyond their size has gone
	dropped int
}

// inherit sorts the items; nil: there was no pager before this one, or none that ever served.
func (d *Daemon) inherit(items []guardian.Item) (*inheritance, error) {
	in := &inheritance{began: time.Now(), frames: map[uint64]*guardian.Item{}, managerFiles: map[uint64]*guardian.Item{}, tasks: map[uint64]*guardian.Item{},
		handles: map[uint64][]guardian.Item{}, mappings: map[uint64][]guardian.Item{}, ranges: map[uint64]guardian.Item{}, wires: map[uint64]guardian.Item{},
		byID: map[uint64]*object{}}
	d.arenas.left = map[string]guardian.Item{}
	d.madeFiles = map[request]files.ID{}
	served := slices.ContainsFunc(items, func(i guardian.Item) bool { return i.Kind == ipc.ItemSetting && i.ID == settingPager })
	if !served {
		guardian.CloseItems(items)
		for _, i := range items {
			d.letGo(i.Kind, i.ID)
		}
		return nil, nil
	}
	bad := func(i *guardian.Item, err error) (*inheritance, error) {
		return in, fmt.Errorf("item %d of kind %d: %w: %w", i.ID, i.Kind, err, ErrState)
	}
	for n := range items {
		i := &items[n]
		switch i.Kind {
		case ipc.ItemState:
			if err := acceptsState(*i); err != nil {
				return bad(i, err)
			}
		case ipc.ItemSetting:
			switch i.ID {
			case settingPager:
				if err := json.Unmarshal(i.Tail, &d.record); err != nil {
					return bad(i, err)
				}
			case settingNumbers:
				d.numbers.last, d.numbers.limit = i.A, i.A
			}
		case ipc.ItemMount:
			in.mount = os.NewFile(uintptr(i.FD), "frames")
		case ipc.ItemListen:
			in.listener = os.NewFile(uintptr(i.FD), "listener")
		case ipc.ItemArena:
			name := string(i.Tail)
			if old, twice := d.arenas.left[name]; twice { // it was on its way out when another of its name was made
				guardian.CloseItems([]guardian.Item{old})
				d.letGo(old.Kind, old.ID)
			}
			d.arenas.left[name] = *i
			d.arenas.last = max(d.arenas.last, i.ID)
		case ipc.ItemPagingFile:
			var r pagingRecord
			if err := json.Unmarshal(i.Tail, &r); err != nil {
				return bad(i, err)
			}
			in.paging = append(in.paging, files.File{ID: files.ID(i.ID), Priority: r.Priority, Sums: d.newSums, Options: file.Options{
				Dir: r.Dir, File: os.NewFile(uintptr(i.FD), fmt.Sprintf("paging file %d", i.ID)), Capacity: r.Capacity, Preallocate: r.Preallocate}})
			d.madeFiles[request{i.Parent, uint32(i.B)}] = files.ID(i.ID)
		case ipc.ItemFrameFile:
			in.frames[i.ID] = i
		case ipc.ItemManagerFile:
			in.managerFiles[i.ID] = i
		case ipc.ItemObject:
			in.objects = append(in.objects, *i)
		case ipc.ItemSocket:
			in.sockets = append(in.sockets, *i)
		case ipc.ItemTask:
			in.tasks[i.ID] = i
		case ipc.ItemHandle:
			in.handles[i.Parent] = append(in.handles[i.Parent], *i)
		case ipc.ItemMapping:
			in.mappings[i.Parent] = append(in.mappings[i.Parent], *i)
		case ipc.ItemRange:
			in.ranges[i.ID] = *i
		case ipc.ItemWire:
			in.wires[i.ID] = *i
		default:
			return bad(i, fmt.Errorf("a kind that this program does not know: %w", emm.InvalidArgument))
		}
	}
	return in, nil
}

// adopt makes objects and sessions of what is left, and drops what belongs to none.
func (d *Daemon) adopt(in *inheritance) error {
	failpoint.Here("daemon.adopt.objects")
	for i := range in.objects {
		if err := d.adoptObject(in, &in.objects[i]); err != nil {
			return err
		}
	}
	failpoint.Here("daemon.adopt.sessions")
	for i := range in.sockets {
		if err := d.adoptSession(in, &in.sockets[i]); err != nil {
			return err
		}
	}
	failpoint.Here("daemon.adopt.orphans")
	d.dropOrphans(in)
	return nil
}

// adoptObject makes one object. One whose table or frames have gone already was on its way out, and nobody has a right to it.
func (d *Daemon) adoptObject(in *inheritance, i *guardian.Item) error {
	var r objectRecord
	if err := json.Unmarshal(i.Tail, &r); err != nil {
		return fmt.Errorf("take over object %d: %w: %w", i.ID, err, ErrState)
	}
	port, err := emm.ParsePort(r.Port)
	if err != nil {
		return fmt.Errorf("take over object %d: %w: %w", i.ID, err, ErrState)
	}
	frame := in.frames[i.ID]
	if frame == nil || !d.arenas.has(tableName(i.ID)) || r.Own && !d.pager.Has(port) {
		d.letGoObject(i.ID)
		in.dropped++
		return nil // its frames, if there are any, are an orphan's
	}
	o := &object{own: r.Own, cluster: r.Cluster, name: r.Manager, record: r}
	o.size.Store(r.Length)
	if !r.Private {
		o.port = port
	}
	for _, l := range r.Rights {
		p, err := emm.ParsePort(l.Port)
		if err != nil {
			return fmt.Errorf("take over object %d: a right to it: %w: %w", i.ID, err, ErrState)
		}
		d.objects.mu.Lock()
		d.objects.name(p, o, &right{port: p, flags: l.Flags})
		d.objects.mu.Unlock()
	}
	opt := vm.AdoptOptions{ID: i.ID, Length: r.Length, ObjectOptions: vm.ObjectOptions{Port: port, Size: r.Size, PageSize: r.PageSize, ClusterSize: r.Cluster,
		ResidentMin: r.ResidentMin, ResidentMax: r.ResidentMax}}
	user, err := d.accounts.of(r.User)
	if err != nil {
		return fmt.Errorf("take over object %d: %w", i.ID, err)
	}
	opt.Account = user.vm
	d.charge(user, port)
	switch {
	case r.Own:
		opt.Manager = d.pager
	case r.Manager != "":
		o.manager = d.reopenManager(in, i.ID, o)
		opt.Manager = o.manager
	default:
		opt.Created = d.pager.Has(port)
	}
	pages := (r.Size + int64(r.PageSize) - 1) / int64(r.PageSize)
	if opt.Table, err = d.newTable(i.ID, pages*8); err != nil {
		return fmt.Errorf("take over object %d: page table: %w", i.ID, err)
	}
	f := os.NewFile(uintptr(frame.FD), "frames")
	frame.FD = 0
	if opt.File, err = d.frames.AdoptFile(f, pages*int64(r.PageSize)); err != nil {
		return fmt.Errorf("take over object %d: frames: %w", i.ID, err)
	}
	delete(in.frames, i.ID)
	opt.File.OnRelease(func() { d.letGo(ipc.ItemFrameFile, i.ID) })
	var found vm.Adopted
	if o.vm, found, err = d.vm.AdoptObject(opt); err != nil {
		return fmt.Errorf("take over object %d: %w", i.ID, err)
	}
	in.byID[i.ID] = o
	d.log.Debug("object taken over", "object", i.ID, "resident", found.Resident, "dirty", found.Dirty, "errors", found.Errors, "punched", found.Punched, "stuck", found.Stuck)
	if r.Length < r.Size { // the shrinking may have been cut short
		o.sizeMu.Lock()
		in.shrunk = append(in.shrunk, o)
	}
	return nil
}

// reopenManager makes the manager of an object once more. One that cannot be made, or may have forgotten what it was given, leaves an object whose every touch is an
// error: never zeros in place of data.
func (d *Daemon) reopenManager(in *inheritance, id uint64, o *object) emm.Manager {
	r := o.record
	o.lost.Store(r.Lost)
	s := objectSpec{size: r.Size, pageSize: r.PageSize, manager: r.Manager, arg: r.Arg}
	if i := in.managerFiles[id]; i != nil {
		s.file = os.NewFile(uintptr(i.FD), "of a task")
		delete(in.managerFiles, id)
	}
	ctx, cancel := context.WithTimeout(context.Background(), guardianPatience)
	defer cancel()
	var m emm.Manager
	err := fmt.Errorf("it does not say that it remembers (Manager.Reopen): %w", emm.MemoryFailure)
	if own := d.managers[r.Manager]; own == nil || own.Reopen {
		m, err = d.openManager(ctx, s, o)
	}
	if err != nil {
		d.log.Error("a memory manager cannot be opened again: its object is lost", "manager", r.Manager, "object", id, "err", err)
		if s.file != nil {
			s.file.Close()
		}
		return lost{}
	}
	return m
}

// lost stands in for a manager that could not be made again.
type lost struct{}

func (lost) Init(emm.Head, int) emm.KernReturn                             { return emm.MemoryFailure }
func (lost) DataRequest(emm.Head, emm.Run, int64, emm.Prot) emm.KernReturn { return emm.MemoryFailure }
func (lost) Terminate(emm.Head) emm.KernReturn                             { return emm.Success }
func (lost) DataReturn(h emm.Head, off int64, data []byte, _, _ bool) emm.KernReturn {
	return h.Control.ReturnCompleted(emm.Run{Off: off, Size: int64(len(data))}, emm.MemoryFailure)
}

// adoptSession makes one session. Whether its task still lives shows when the connection is read.
func (d *Daemon) adoptSession(in *inheritance, i *guardian.Item) error {
	fail := func(err error) error { return fmt.Errorf("take over session %d: %w", i.ID, err) }
	f := os.NewFile(uintptr(i.FD), "of a task")
	uc, err := fileConn(f)
	f.Close()
	if err != nil {
		return fail(err)
	}
	conn, err := ipc.NewConn(uc)
	if err != nil {
		uc.Close()
		return fail(err)
	}
	s := &session{d: d, id: i.ID, own: i.A != 0, uc: uc, conn: conn, handles: map[uint64]*object{}, rights: map[uint64]*right{}, mappings: map[uint64]*mapping{},
		madeHandles: map[uint32]uint64{}, madeMappings: map[uint32]*mapping{}}
	for last := d.lastID.Load(); last < s.id; last = d.lastID.Load() {
		d.lastID.CompareAndSwap(last, s.id)
	}
	if s.peer, err = conn.Peer(); err != nil {
		return fail(err)
	}
	s.log = d.log.With("session", s.id, "pid", s.peer.Pid, "uid", s.peer.Uid)
	s.leave, _, _ = d.limits.enter(s.peer.Uid) // it has been let in
	if t := in.tasks[s.id]; t != nil {
		s.fd, s.given = uffd.FromFdNonblock(t.FD), true
		delete(in.tasks, s.id)
		if s.task, err = d.vm.NewTask(s.fd, int(s.peer.Pid)); err != nil {
			return fail(err)
		}
	}
	for _, h := range in.handles[s.id] {
		o := in.byID[h.A]
		if o == nil {
			d.log.Error("a handle of an object that is not there", "session", s.id, "handle", h.ID, "object", h.A)
			d.letGo(h.Kind, h.ID)
			continue
		}
		d.objects.add(o)
		s.handles[h.ID] = o
		if r := d.rightOf(o, string(h.Tail)); r != nil {
			s.rights[h.ID] = r
		}
		s.madeHandles[uint32(h.B)] = h.ID
	}
	delete(in.handles, s.id)
	for n := range in.mappings[s.id] {
		if err := s.adoptMapping(in, &in.mappings[s.id][n]); err != nil {
			return fail(err)
		}
	}
	delete(in.mappings, s.id)
	in.taken = append(in.taken, s)
	return nil
}

// adoptMapping makes one mapping of a session that has its handles. One that cannot be taken over is the guardian's, with the rest of its task: see resume.
func (s *session) adoptMapping(in *inheritance, i *guardian.Item) error {
	d := s.d
	var r mappingRecord
	if err := json.Unmarshal(i.Tail, &r); err != nil {
		return fmt.Errorf("mapping %d: %w: %w", i.ID, err, ErrState)
	}
	rg, started := in.ranges[i.ID]
	delete(in.ranges, i.ID)
	w, wired := in.wires[i.ID]
	delete(in.wires, i.ID)
	o := in.byID[i.A]
	m := &mapping{id: i.ID, session: s.id, seq: uint32(i.B), object: o, record: r, started: started, addr: rg.A}
	spans := r.Spans
	if started && len(spans) == 0 {
		spans = []vm.Span{{Addr: rg.A, Off: r.Offset, Size: r.Size}}
	}
	var err error
	switch {
	case o == nil:
		err = fmt.Errorf("object %d is not there: %w", i.A, emm.InvalidObject)
	case s.task == nil:
		err = emm.InvalidTask
	default:
		m.vm, err = s.task.AdoptMapping(o.vm, i.ID, r.Offset, r.Size, r.ReadOnly, spans)
	}
	if err != nil {
		s.log.Error("a mapping cannot be taken over: the connection ends", "mapping", i.ID, "err", err)
		s.spoiled = s.spoiled || started
		d.letGo(i.Kind, i.ID)
		return nil
	}
	d.objects.add(o)
	m.right = d.rightOf(o, r.Right)
	s.addMapping(m)
	s.madeMappings[m.seq] = m
	if !wired {
		return nil
	}
	m.wires.inside = true
	if m.wires.runs, m.wires.seqs, err = decodeWires(w.Tail); err != nil {
		return fmt.Errorf("mapping %d: %w: %w", i.ID, err, ErrState)
	}
	for _, run := range m.wires.runs {
		for range run.count {
			if err := m.vm.AdoptWire(run.off, run.size); err != nil {
				return fmt.Errorf("mapping %d: %w", i.ID, err)
			}
		}
	}
	return nil
}

// dropOrphans gives up what belongs to nothing any more, or never did.
func (d *Daemon) dropOrphans(in *inheritance) {
	drop := func(items ...guardian.Item) {
		for _, i := range items {
			guardian.CloseItems([]guardian.Item{i})
			d.letGo(i.Kind, i.ID)
			in.dropped++
		}
	}
	for _, i := range in.tasks {
		drop(*i)
	}
	for _, list := range in.handles {
		drop(list...)
	}
	for _, list := range in.mappings {
		drop(list...)
	}
	for _, i := range in.ranges {
		drop(i)
	}
	for _, i := range in.wires {
		drop(i)
	}
	for _, i := range in.managerFiles {
		drop(*i)
	}
	for _, i := range in.frames { // of objects that had ended; a task may have them open
		id := i.ID
		if err := d.frames.AdoptClosed(os.NewFile(uintptr(i.FD), "frames"), func() { d.letGo(ipc.ItemFrameFile, id) }); err != nil {
			d.log.Warn("frames of an object that has ended", "object", id, "err", err)
		}
		in.dropped++
	}
	known := map[emm.Port]bool{}
	for _, o := range in.byID {
		known[o.vm.Port()] = true
	}
	in.dropped += d.pager.Claim(func(p emm.Port) bool { return known[p] })
	in.dropped += d.dropLeft()
}

// resume lets the vm go on, and ends what was on its way out: objects that nobody has a right to, sizes whose shrinking was cut short.
func (d *Daemon) resume(in *inheritance) {
	d.vm.Resume()
	d.log.Info("taken over from a pager that died", "took", time.Since(in.began), "objects", len(in.byID), "sessions", len(in.taken), "dropped", in.dropped)
	for _, o := range in.shrunk {
		d.ends.Go(func() {
			defer o.sizeMu.Unlock()
			size, whole := o.size.Load(), int64(o.record.PageSize)
			end := (o.record.Size + whole - 1) / whole * whole // the last page too, of which the object may have a part only
			if err := o.vm.Discard(context.Background(), size, end-size); err != nil && !errors.Is(err, emm.InvalidObject) {
				d.log.Error("what lies beyond the size of an object is not gone", "object", o.vm.ID(), "err", err)
			}
		})
	}
	ids := make([]*object, 0, len(in.byID))
	for _, o := range in.byID {
		ids = append(ids, o)
	}
	slices.SortFunc(ids, func(a, b *object) int { return cmp.Compare(a.vm.ID(), b.vm.ID()) })
	for _, o := range ids {
		if d.objects.unowned(o) {
			d.objects.add(o)
			d.ends.Go(func() { d.release(o) })
		}
	}
}

// again serves a session that was taken over.
func (s *session) again(ctx context.Context, restarted *ipc.Restarted, ended func()) {
	defer ended()
	defer s.leave()
	if s.spoiled {
		s.conn.Close()
		s.close()
		return
	}
	s.run(ctx, s.conn, restarted, ended)
}

// listen makes the socket that tasks connect to, or takes over what the pager before this one had, or what a service manager has made.
func (d *Daemon) listen(left *inheritance, given *os.File) (*net.UnixListener, error) {
	if d.config.Activated {
		return listenAt(given) // every pager gets it
	}
	if left != nil && left.listener != nil {
		l, err := net.FileListener(left.listener)
		left.listener.Close()
		if err != nil {
			return nil, fmt.Errorf("listen at %s: take over the socket: %w", d.config.Socket, err)
		}
		ul, ok := l.(*net.UnixListener)
		if !ok {
			l.Close()
			return nil, fmt.Errorf("listen at %s: take over the socket: it is none: %w", d.config.Socket, ErrState)
		}
		ul.SetUnlinkOnClose(true)
		return ul, nil
	}
	l, err := listen(d.config.Socket, d.config.Group)
	if err != nil {
		return nil, err
	}
	if err := withFD(l, func(fd int) error { return d.hold(guardian.Item{Kind: ipc.ItemListen, ID: 1, FD: fd}) }); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen at %s: %w", d.config.Socket, err)
	}
	return l, nil
}
