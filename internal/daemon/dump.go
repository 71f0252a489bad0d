package daemon

import (
	"cmp"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"machpager/internal/frames"
	"machpager/internal/ipc"
	"machpager/internal/vm"
)

// Dump is what a pager has, for people: its parts are looked at one after the other, while all goes on. It travels as JSON.
type Dump struct {
	Version     string        `json:"version"`
	Kernel      string        `json:"kernel"`
	PID         int           `json:"pager_pid"`
	Guardian    int           `json:"guardian_pid"` // 0: gone
	Tier        string        `json:"tier"`
	Confinement string        `json:"confinement"`
	Up          time.Duration `json:"up_ns"`
	Goroutines  int           `json:"goroutines"`
	Frames      FramesDump    `json:"frames"`
	Paging      PagingDump    `json:"paging"`
	Sessions    []SessionDump `json:"sessions"`
	Rights      []RightsDump  `json:"rights"` // by object
	Limits      LimitsDump    `json:"limits"`
	VM          vm.Dump       `json:"vm"`
}

// FramesDump is where resident pages are, in bytes.
type FramesDump struct {
	Kind     string `json:"kind"`
	Budget   int64  `json:"budget_bytes"`
	Reserved int64  `json:"reserved_bytes"`
	Kernel   int64  `json:"kernel_bytes"` // as the kernel counts; -1: unknown
	Extents  bool   `json:"extents"`      // 2 MiB are filled as one folio
	NoSwap   bool   `json:"noswap"`       // Linux does not swap them
	Left     int    `json:"left"`         // files of ended objects that tasks have kept open
}

// PagingDump is paging space, in bytes.
type PagingDump struct {
	Kind  string     `json:"kind"`
	Total int64      `json:"total_bytes"`
	Used  int64      `json:"used_bytes"`
	Free  int64      `json:"free_bytes"`
	Files []FileDump `json:"files"`
}

// FileDump is a paging file, in bytes.
type FileDump struct {
	ID       int    `json:"id"`
	Dir      string `json:"dir"`
	Priority int    `json:"priority"`
	Leaving  bool   `json:"leaving"` // it is being removed
	Total    int64  `json:"total_bytes"`
	Used     int64  `json:"used_bytes"`
	Free     int64  `json:"free_bytes"`
	Errors   int64  `json:"errors"` // operations that failed
}

// SessionDump is a connection.
type SessionDump struct {
	ID       uint64 `json:"id"`
	PID      int32  `json:"pid"`
	UID      uint32 `json:"uid"`
	Task     uint64 `json:"task"` // in the vm; 0: no userfaultfd was handed over
	Handles  int    `json:"handles"`
	Mappings int    `json:"mappings"` // as many ranges as the guardian holds of it
}

// RightsDump is what is known of an object outside the vm.
type RightsDump struct {
	Object  uint64 `json:"object"` // in the vm
	Manager string `json:"manager"`
	Private bool   `json:"private"` // no port: nobody else can open it
	Rights  int    `json:"rights"`  // handles and mappings
	Stored  int64  `json:"stored_bytes"`
}

// LimitsDump is how many there are, and how many there may be.
type LimitsDump struct {
	Sessions    int `json:"sessions"`
	MaxSessions int `json:"max_sessions"`
	Objects     int `json:"objects"`
	MaxObjects  int `json:"max_objects"`
}

// roster is who is connected.
type roster struct {
	mu   sync.Mutex
	list map[uint64]*session // guarded by mu; by number
}

// enter adds a session; leave takes it out.
func (r *roster) enter(s *session) (leave func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.list == nil {
		r.list = map[uint64]*session{}
	}
	r.list[s.id] = s
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.list, s.id)
	}
}

// all lists the sessions, oldest first.
func (r *roster) all() []*session {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]*session, 0, len(r.list))
	for _, s := range r.list {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *session) int { return cmp.Compare(a.id, b.id) })
	return list
}

var started = time.Now()

// dump looks at everything.
func (d *Daemon) dump() Dump {
	space := d.pager.Info()
	x := Dump{Version: Version, Kernel: kernelRelease(), PID: os.Getpid(), Guardian: int(d.guardianPID()), Tier: string(d.tier.letter), Confinement: d.confinement,
		Up: time.Since(started), Goroutines: runtime.NumGoroutine(), VM: d.vm.Dump(),
		Frames: FramesDump{Kind: d.frames.Kind().String(), Budget: d.frames.Budget(), Reserved: d.frames.Reserved() * frames.PageSize, Kernel: -1,
			Extents: d.frames.Extents(), NoSwap: d.frames.NoSwap(), Left: d.frames.Left()},
		Paging: PagingDump{Kind: cmp.Or(d.config.Store, StoreTiered), Total: space.Total, Used: space.Used, Free: space.Free}}
	if n, err := d.frames.Usage(); err == nil {
		x.Frames.Kernel = n
	}
	if d.backing != nil {
		for _, f := range d.backing.Files() {
			x.Paging.Files = append(x.Paging.Files, FileDump{int(f.ID), f.Dir, f.Priority, f.Leaving, f.Total, f.Used, f.Free, f.InFailed + f.OutFailed})
		}
	}
	for _, s := range d.roster.all() {
		s.mu.Lock()
		r := SessionDump{ID: s.id, PID: s.peer.Pid, UID: s.peer.Uid, Handles: len(s.handles), Mappings: len(s.mappings)}
		if s.task != nil {
			r.Task = s.task.ID()
		}
		s.mu.Unlock()
		x.Sessions = append(x.Sessions, r)
	}
	objects, _ := d.objects.after(0, maxObjects)
	for _, o := range objects {
		r := RightsDump{Object: o.vm.ID(), Manager: cmp.Or(o.name, "default pager"), Private: o.port.IsNull(), Rights: d.objects.count(o)}
		for _, run := range d.storedRuns(o) {
			r.Stored += run.Size
		}
		x.Rights = append(x.Rights, r)
	}
	d.limits.mu.Lock()
	x.Limits = LimitsDump{Sessions: d.limits.all, MaxSessions: d.limits.sessions, Objects: len(objects), MaxObjects: d.limits.objects}
	d.limits.mu.Unlock()
	return x
}

// count is how many rights there are to an object.
func (t *objects) count(o *object) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return o.rights
}

func (s *session) dump() (ipc.Reply, error) {
	if err := s.operator(); err != nil {
		return ipc.Reply{}, err
	}
	return document("dump", s.d.dump())
}
