package vm

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/arena"
	"machpager/internal/failpoint"
	"machpager/internal/frames"
	"machpager/pager/emm"
	"machpager/uffd"
)

// legacy is what a pager gets at its start. The descriptors come in this order: mount (if any), for each object table, file and store, for each task its userfaultfd.
type legacy struct {
	Fail    string // failpoints
	Budget  int64
	State   frames.State
	Objects []legacyObject
	Tasks   []legacyTask
	Seed    uint64
	Busy    bool // page out, clean and synchronise all the time
}

type legacyObject struct {
	ID           uint64
	Size, Length int64
	PageSize     int
	Cluster      int64
	Max          int64
	Port         string
	Internal     bool // a temporary object of the vm's own, which the default manager may have
	Temporary    bool // as its manager says
}

type legacyTask struct {
	PID      int
	Mappings []legacyMapping
}

type legacyMapping struct {
	ID        uint64
	Object    int // index
	Off, Size int64
	ReadOnly  bool
	Spans     []Span
}

// verdict is what a pager says of itself when it is asked.
type verdict struct {
	Err                                string
	Reserved, Counted, Resident, Wired int64 // frames
	Bugs                               int64
	Used                               int64 // bytes
	Hits                               map[string]int64
}

// pagerMain is the pager's process.
func pagerMain() {
	panicOnBug = true
	c, err := net.FileConn(os.NewFile(3, "test"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := servePager(c.(*net.UnixConn)); err != nil {
		fmt.Fprintln(os.Stderr, "pager:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func servePager(conn *net.UnixConn) error {
	b, fds, err := recvFds(conn)
	if err != nil {
		return err
	}
	var l legacy
	if err := json.Unmarshal(b, &l); err != nil {
		return err
	}
	next := func(name string) *os.File {
		f := os.NewFile(uintptr(fds[0]), name)
		fds = fds[1:]
		return f
	}
	if err := failpoint.Arm(l.Fail); err != nil {
		return err
	}
	fo := frames.Options{Budget: l.Budget, Adopt: &l.State}
	if l.State.Kind != frames.Memfd {
		fo.Mount = next("mount")
	}
	pool, err := frames.Open(fo)
	if err != nil {
		return err
	}
	v, err := New(Options{Frames: pool, Adopting: true, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		NewTable: func(_ uint64, n int64) (Table, error) {
			a, err := arena.Create("pages", "test", 1, n)
			if err == nil {
				err = a.Grow(n)
			}
			return a, err
		}})
	if err != nil {
		return err
	}
	var objects []*Object
	for _, lo := range l.Objects {
		table, err := arena.Open(next("table"), "test", 1, lo.Size)
		if err != nil {
			return err
		}
		file, err := pool.AdoptFile(next("file"), lo.Size)
		if err != nil {
			return err
		}
		st := next("store")
		info, err := st.Stat()
		if err != nil {
			return err
		}
		mem, err := unix.Mmap(int(st.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		st.Close()
		if err != nil {
			return err
		}
		s := &slab{mem: mem, ps: int64(lo.PageSize), n: lo.Size / int64(lo.PageSize), temporary: lo.Internal || lo.Temporary}
		port, err := emm.ParsePort(lo.Port)
		if err != nil {
			return err
		}
		opt := AdoptOptions{ObjectOptions: ObjectOptions{Port: port, Size: lo.Size, PageSize: lo.PageSize, ClusterSize: lo.Cluster, ResidentMax: lo.Max}, ID: lo.ID, Length: lo.Length,
			Table: table, File: file}
		if lo.Internal {
			v.SetDefaultManager(s)
			opt.Created = s.created().Load() != 0
		} else {
			opt.Manager = s
		}
		o, _, err := v.AdoptObject(opt)
		if err != nil {
			return err
		}
		objects = append(objects, o)
	}
	mappings := map[uint64]*Mapping{}
	for _, lt := range l.Tasks {
		t, err := v.NewTask(uffd.FromFd(fds[0]), lt.PID)
		fds = fds[1:]
		if err != nil {
			return err
		}
		for _, lm := range lt.Mappings {
			m, err := t.AdoptMapping(objects[lm.Object], lm.ID, lm.Off, lm.Size, lm.ReadOnly, lm.Spans)
			if err != nil {
				return err
			}
			mappings[lm.ID] = m
		}
	}
	v.Resume()
	if _, err := conn.Write([]byte("{}")); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var busy sync.WaitGroup
	if l.Busy {
		for i, o := range objects {
			busy.Go(func() { o.bother(ctx, rand.New(rand.NewPCG(l.Seed, uint64(i)))) })
		}
	}
	buf := make([]byte, 1<<16)
	for {
		n, err := conn.Read(buf)
		if err == io.EOF || n == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		var q pagerOrder
		var r verdict
		if err := json.Unmarshal(buf[:n], &q); err != nil {
			return err
		}
		if q.Op == "check" {
			cancel()
			busy.Wait()
			r = judge(v, objects)
		} else if err := q.obey(v, objects, mappings); err != nil {
			r.Err = err.Error()
		}
		out, _ := json.Marshal(r)
		if _, err := conn.Write(out); err != nil {
			return err
		}
	}
}

// pagerOrder is what the test asks the pager to do, as a task would.
type pagerOrder struct {
	Op      string // check, or what obey knows
	Object  int
	Mapping uint64
	Off, N  int64
}

func (q *pagerOrder) obey(v *VM, objects []*Object, mappings map[uint64]*Mapping) error {
	ctx := context.Background()
	switch q.Op {
	case "map": // and unmap: a task's, which never touches it
		m, f, err := mappings[q.Mapping].task.NewMapping(objects[q.Object], q.Off, q.N, false)
		if err != nil {
			return err
		}
		f.Close()
		if err := m.Start(1 << 40); err != nil {
			return err
		}
		short, cancel := context.WithTimeout(ctx, 5*time.Millisecond)
		defer cancel()
		m.Wire(short, 0, min(q.N, 8*4096)) // in vain: nothing is there
		m.Close()
		return nil
	case "create": // and terminate
		mem, err := unix.Mmap(-1, 0, 2<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		defer unix.Munmap(mem)
		o, err := v.NewObject(ObjectOptions{Size: 64 * 4096, Manager: &slab{mem: mem, ps: 4096, n: 64}, Port: emm.NewPort()})
		if err != nil {
			return err
		}
		o.Terminate()
		return nil
	case "pageout":
		return objects[q.Object].PageOut(ctx, q.Off, q.N)
	case "discard":
		return objects[q.Object].Discard(ctx, q.Off, q.N)
	case "setsize":
		return objects[q.Object].SetSize(ctx, q.N)
	case "populate":
		return mappings[q.Mapping].Populate(ctx, q.Off, q.N, true)
	}
	return fmt.Errorf("unknown order %q", q.Op)
}

// judge counts the frames of the tables, when nothing changes any more, and holds them against what is reserved.
func judge(v *VM, objects []*Object) verdict {
	time.Sleep(50 * time.Millisecond)
	r := verdict{Reserved: v.frames.Reserved(), Bugs: v.Stats().Bugs, Wired: v.wired.Load(), Hits: failpoint.Hits()}
	for _, o := range objects {
		for p := range o.npages() {
			if o.word(p).Resident() {
				r.Counted += int64(o.framesOf(1))
			}
		}
		r.Counted += o.stuck.Load()
		r.Resident += o.resident.Load()
	}
	used, err := v.frames.Usage()
	if err != nil {
		r.Err = err.Error()
	}
	r.Used = used
	return r
}

func recvFds(c *net.UnixConn) ([]byte, []int, error) {
	b, oob := make([]byte, 1<<16), make([]byte, 1<<12)
	n, on, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:on])
	if err != nil || len(msgs) == 0 {
		return b[:n], nil, err
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	return b[:n], fds, err
}

// mortal is the test's end of a pager that may be killed.
type mortal struct {
	t      testing.TB
	e      *estate
	l      legacy
	stores []int
	uffds  []int

	cmd  *exec.Cmd
	conn *net.UnixConn
	gone chan struct{}
}

func newMortal(t testing.TB, kind frames.Kind, budget int64) *mortal {
	m := &mortal{t: t, e: newEstate(t, kind, budget)}
	m.l.Budget, m.l.State, m.l.Seed = budget, m.e.pool.State(), rand.Uint64()
	t.Logf("seed %d", m.l.Seed)
	t.Cleanup(func() {
		m.kill()
		for _, fd := range append(m.stores, m.uffds...) {
			unix.Close(fd)
		}
	})
	return m
}

// object is made before the first pager starts.
func (m *mortal) object(lo legacyObject) int {
	m.t.Helper()
	lo.ID, lo.Length, lo.Port = uint64(len(m.l.Objects)+1), lo.Size, emm.NewPort().String()
	m.e.add(m.t, ObjectOptions{Size: lo.Size, PageSize: lo.PageSize})
	fd, err := unix.MemfdCreate("store", unix.MFD_CLOEXEC)
	if err == nil {
		err = unix.Ftruncate(fd, slabHead(lo.Size/int64(lo.PageSize))+lo.Size)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	m.stores = append(m.stores, fd)
	m.l.Objects = append(m.l.Objects, lo)
	return len(m.l.Objects) - 1
}

// task starts a task that maps the whole of these objects; orders name the mapping by the object's index.
func (m *mortal) task(objects ...int) *task {
	m.t.Helper()
	x, fd := spawnTask(m.t)
	m.uffds = append(m.uffds, fd)
	lt := legacyTask{PID: x.cmd.Process.Pid}
	for _, i := range objects {
		f, err := m.e.objs[i].file.Dup()
		if err != nil {
			m.t.Fatal(err)
		}
		size := m.l.Objects[i].Size
		r := x.do(order{Op: "map", ID: i, N: size}, f)
		f.Close()
		lt.Mappings = append(lt.Mappings, legacyMapping{ID: uint64(1000*len(m.l.Tasks) + i + 1), Object: i, Size: size, Spans: []Span{{r.Addr, 0, size}}})
	}
	m.l.Tasks = append(m.l.Tasks, lt)
	return x
}

// start starts a pager on what the last one left, and waits until it serves. false: a failpoint has ended it before.
func (m *mortal) start(fail string) bool {
	m.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	theirs, ours := os.NewFile(uintptr(fds[0]), "pager"), os.NewFile(uintptr(fds[1]), "test")
	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0], cmd.ExtraFiles, cmd.Stderr = pagerRole, []*os.File{theirs}, os.Stderr
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	theirs.Close()
	c, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		m.t.Fatal(err)
	}
	m.cmd, m.conn, m.gone = cmd, c.(*net.UnixConn), make(chan struct{})
	go func(gone chan struct{}) { cmd.Wait(); close(gone) }(m.gone)
	m.l.Fail = fail
	b, _ := json.Marshal(m.l)
	var all []int
	if n := m.e.pool.Mount(); n >= 0 {
		all = append(all, n)
	}
	for i, r := range m.e.objs {
		all = append(all, int(r.table.File().Fd()), r.file.Fd(), m.stores[i])
	}
	all = append(all, m.uffds...)
	if _, _, err := m.conn.WriteMsgUnix(b, unix.UnixRights(all...), nil); err != nil {
		m.t.Fatal(err)
	}
	m.conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := m.conn.Read(make([]byte, 64)); err != nil || n == 0 {
		m.died(fail != "")
		return false
	}
	return true
}

// kill ends the pager, and waits until it is certainly gone.
func (m *mortal) kill() {
	if m.cmd != nil {
		m.cmd.Process.Kill()
		<-m.gone
		m.conn.Close()
		m.cmd = nil
	}
}

// died waits for the end of a pager that is expected to have been killed.
func (m *mortal) died(expected bool) {
	m.t.Helper()
	select {
	case <-m.gone:
	case <-time.After(20 * time.Second):
		m.cmd.Process.Signal(syscall.SIGQUIT)
		m.t.Fatal("the pager neither serves nor ends")
	}
	s := m.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !expected || !s.Signaled() || s.Signal() != syscall.SIGKILL {
		m.t.Fatalf("the pager ended by itself: %v", m.cmd.ProcessState)
	}
	m.kill()
}

// ask has the pager do something. false: it was killed meanwhile.
func (m *mortal) ask(q pagerOrder) (r verdict, alive bool) {
	m.t.Helper()
	b, _ := json.Marshal(q)
	if _, err := m.conn.Write(b); err != nil {
		return r, false
	}
	m.conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	buf := make([]byte, 1<<16)
	n, err := m.conn.Read(buf)
	if os.IsTimeout(err) {
		m.cmd.Process.Signal(syscall.SIGQUIT)
		time.Sleep(500 * time.Millisecond)
		m.t.Fatalf("the pager does not answer %s", q.Op)
	}
	if err != nil || n == 0 {
		return r, false
	}
	if err := json.Unmarshal(buf[:n], &r); err != nil {
		m.t.Fatal(err)
	}
	return r, true
}

// check has a pager that does nothing any more count its frames.
func (m *mortal) check() verdict {
	m.t.Helper()
	r, ok := m.ask(pagerOrder{Op: "check"})
	if !ok || r.Err != "" {
		m.t.Fatalf("the last pager: %+v", r)
	}
	if r.Reserved != r.Counted || r.Resident != r.Reserved || r.Bugs != 0 || r.Used > r.Reserved*4096 {
		m.t.Errorf("at the end: %+v", r)
	}
	return r
}
