package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/internal/arena"
	"machpager/internal/failpoint"
	"machpager/internal/frames"
	"machpager/pager/emm"
	"machpager/uffd"
)

// Here the pager is a process of its own, so that it can be killed at any instruction: this test binary again. The test is its guardian: it holds the mount, tables, files, the
// managers' stores and the tasks' userfaultfds, and hands them to the next one. Every one adopts, also the first: from an empty table.

const pagerRole = "vm-test-pager"

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

// slab is a manager whose pages outlive the process: a memfd, page by page, behind a byte for each page that says that it was stored, and one that says that the object
// was created. It answers at once or from another goroutine.
type slab struct {
	mem       []byte
	ps, n     int64
	temporary bool
}

func (s *slab) flag(p int64) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&s.mem[4*p]))
}
func (s *slab) created() *atomic.Uint32 { return s.flag(s.n) }

func slabHead(n int64) int64 { return (4*(n+1) + 4095) &^ 4095 }

func (s *slab) Init(h emm.Head, _ int) emm.KernReturn {
	return h.Control.ChangeAttributes(emm.Attributes{Temporary: s.temporary, ClusterSize: 2 << 20}, false)
}

func (s *slab) Create(h emm.Head, _ emm.Port, _ int64, _ int) emm.KernReturn {
	s.created().Store(1)
	return s.Init(h, 0)
}

func (s *slab) DataRequest(h emm.Head, want emm.Run, _ int64, _ emm.Prot) emm.KernReturn {
	answer := func() {
		for off := want.Off; off < want.End(); {
			p, end := off/s.ps, off/s.ps+1
			had := s.flag(p).Load()
			for end*s.ps < want.End() && s.flag(end).Load() == had {
				end++
			}
			if had == 0 {
				h.Control.DataUnavailable(emm.Run{Off: off, Size: (end - p) * s.ps})
			} else {
				h.Control.DataSupply(off, s.mem[slabHead(s.n)+off:][:(end-p)*s.ps], emm.ProtNone, false, false)
			}
			off = end * s.ps
		}
	}
	if rand.IntN(2) == 0 {
		answer()
	} else {
		go answer()
	}
	return emm.Success
}

func (s *slab) DataReturn(h emm.Head, off int64, data []byte, _, _ bool) emm.KernReturn {
	store := func() {
		zero := true
		for _, b := range data {
			if b != 0 {
				zero = false
				break
			}
		}
		copy(s.mem[slabHead(s.n)+off:], data)
		for p := off / s.ps; p < (off+int64(len(data)))/s.ps; p++ {
			if zero {
				s.flag(p).Store(0)
			} else {
				s.flag(p).Store(1)
			}
		}
		h.Control.ReturnCompleted(emm.Run{Off: off, Size: int64(len(data))}, emm.Success)
	}
	if rand.IntN(2) == 0 {
		store()
	} else {
		go store()
	}
	return emm.Success
}

func (s *slab) DataInitialize(h emm.Head, off int64, data []byte) emm.KernReturn {
	return s.DataReturn(h, off, data, true, false)
}

func (s *slab) Terminate(emm.Head) emm.KernReturn { return emm.Success }

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

// bother does what a pager does of its own accord, or on request, without changing the contents.
func (o *Object) bother(ctx context.Context, rng *rand.Rand) {
	for ctx.Err() == nil {
		off := rng.Int64N(o.Size())
		n := min(o.Size()-off, 1+rng.Int64N(1<<rng.IntN(20)))
		switch rng.IntN(6) {
		case 0:
			o.Snapshot(ctx, func(emm.Port) error { return nil })
		case 1, 2:
			o.Sync(ctx, off, n)
		default:
			o.PageOut(ctx, off, n)
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

// The pager is killed again and again, at random instants, while tasks check every value they read, under a budget that makes pages come and go all the time.
func TestKilledPager(t *testing.T) {
	for _, c := range []struct {
		kind         frames.Kind
		budget, size int64
		ps           int
		cluster      int64
	}{{frames.Tmpfs, 4 << 20, 8 << 20, 4096, 0}, {frames.Tmpfs, 24 << 20, 16 << 20, 4096, 2 << 20}, {frames.Memfd, 2 << 20, 8 << 20, 65536, 0}} {
		t.Run(fmt.Sprintf("%v,budget=%d,page=%d,cluster=%d", c.kind, c.budget, c.ps, c.cluster), func(t *testing.T) {
			m := newMortal(t, c.kind, c.budget)
			m.l.Busy = true
			a := m.object(legacyObject{Size: c.size, PageSize: c.ps, Cluster: c.cluster})
			b := m.object(legacyObject{Size: c.size / 2, PageSize: c.ps, Cluster: c.cluster, Internal: true})
			seconds := 1.5
			var wg sync.WaitGroup
			m.start("")
			for i := range 2 {
				for _, id := range []int{a, b} {
					x := m.task(id)
					wg.Go(func() {
						r := x.do(order{Op: "stress", ID: id, N: m.l.Objects[id].Size, Seconds: seconds, Seed: m.l.Seed, Slot: i, Slots: 2, Threads: 2}, nil)
						if r.Wrong > 0 || r.Ops == 0 {
							t.Errorf("%d wrong values in %d operations", r.Wrong, r.Ops)
						}
					})
				}
			}
			m.kill() // it knows of no task
			kills := 0
			for end := time.Now().Add(time.Duration(seconds * float64(time.Second))); time.Now().Before(end); kills++ {
				m.start("")
				time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
				m.kill()
			}
			m.start("")
			wg.Wait()
			m.check()
			t.Logf("%d pagers killed", kills)
			if kills < 5 {
				t.Errorf("only %d pagers were killed", kills)
			}
		})
	}
}

// failpoints are the names in this package's files, in order.
func failpoints(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal("no sources here")
	}
	var names []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(f, "_test.go") {
			for _, m := range regexp.MustCompile(`failpoint\.Here\("([^"]+)"\)`).FindAllStringSubmatch(string(b), -1) {
				names = append(names, m[1])
			}
		}
	}
	slices.Sort(names)
	return names
}

// Every failpoint is in the page that describes the states, once.
func TestFailpointsAreListed(t *testing.T) {
	names := failpoints(t)
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("a name stands for two places: %q", names)
	}
	b, err := os.ReadFile("../../docs/pagestates.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if n := strings.Count(string(b), "`"+name+"`"); n != 1 {
			t.Errorf("docs/pagestates.md names %s %d times", name, n)
		}
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z]+\\.[a-z-]+)` \\|").FindAllStringSubmatch(string(b), -1) {
		if !slices.Contains(names, m[1]) {
			t.Errorf("docs/pagestates.md names %s, which there is not", m[1])
		}
	}
}

// The pager is killed at every failpoint, the first time it comes by or a later one, while two tasks check every value, and a third one's pages are discarded, cut off, and must be neither stale nor lost; what
// the dead pager did not finish is asked for again. The object has a manager or, in the second half, is a temporary one.
func TestKilledAtEveryFailpoint(t *testing.T) {
	names := failpoints(t)
	if raceEnabled { // a process starts in a fifth of a second then: a third of them, others each time
		rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		names = names[:len(names)/3]
	}
	m := newMortal(t, frames.Tmpfs, 16<<20)
	m.l.Busy = true
	a := m.object(legacyObject{Size: 4 << 20, PageSize: 4096})
	b := m.object(legacyObject{Size: 2 << 20, PageSize: 4096, Internal: true})
	c := m.object(legacyObject{Size: 512 << 10, PageSize: 4096, Temporary: true})
	e := m.object(legacyObject{Size: 2 << 20, PageSize: 4096, Cluster: 2 << 20})
	met := map[string]bool{}
	if m.start("pageout.created=1:kill") { // it comes once in an object's life, here with a snapshot
		m.died(true)
	}
	met["pageout.created"] = true
	z, z2 := m.task(c, e), m.task(e)
	var wg sync.WaitGroup
	const seconds = 3
	for i, id := range []int{a, b, a} {
		x := m.task(id)
		wg.Go(func() {
			r := x.do(order{Op: "stress", ID: id, N: m.l.Objects[id].Size, Seconds: seconds, Seed: m.l.Seed, Slot: i / 2, Slots: 2, Threads: 1}, nil)
			if r.Wrong > 0 || r.Ops == 0 {
				t.Errorf("object %d: %d wrong values in %d operations", id, r.Wrong, r.Ops)
			}
		})
	}
	const pages = 128
	version, meddle := byte(0), false
	// round fills the third task's object, discards a part, cuts another off, and looks. With a failpoint armed, the pager may die in any of it.
	round := func() {
		alive := true
		ask := func(q pagerOrder) { // as a task does: until it is answered
			for {
				var r verdict
				if alive {
					r, alive = m.ask(q)
				}
				if alive {
					if r.Err != "" {
						t.Fatalf("%+v: %s", q, r.Err)
					}
					if q.Op == "setsize" {
						m.l.Objects[c].Length = q.N
					}
					return
				}
				m.died(true)
				alive = m.start("")
			}
		}
		version++
		fill := bytes.Repeat([]byte{version}, 65536)
		wrote := make(chan bool, 1)
		go func() {
			for off := int64(0); off < pages*4096; off += 65536 {
				z.write(c, off, fill)
			}
			wrote <- true
		}()
		for done := false; !done; { // the pager may die under the writer: then it waits, and another comes
			select {
			case done = <-wrote:
			case <-m.gone:
				m.died(true)
				alive = m.start("")
			}
		}
		ask(pagerOrder{Op: "map", Mapping: m.l.Tasks[0].Mappings[0].ID, Object: a, N: 1 << 20})
		ask(pagerOrder{Op: "create"})
		ask(pagerOrder{Op: "pageout", Object: c, Off: 0, N: pages / 2 * 4096})
		ask(pagerOrder{Op: "discard", Object: c, Off: pages / 4 * 4096, N: pages / 2 * 4096})
		ask(pagerOrder{Op: "setsize", Object: c, N: pages * 7 / 8 * 4096})
		ask(pagerOrder{Op: "setsize", Object: c, N: pages * 4096})
		ask(pagerOrder{Op: "pageout", Object: e, N: m.l.Objects[e].Size}) // so that a whole extent comes in
		ask(pagerOrder{Op: "populate", Mapping: m.l.Tasks[0].Mappings[0].ID, N: 8 * 4096})
		if meddle { // as a task can that has the file
			if _, err := m.e.objs[c].file.WriteAt([]byte{99}, pages/2*4096); err != nil {
				t.Fatal(err)
			}
		}
		want := bytes.Repeat([]byte{version}, pages*4096)
		clear(want[pages/4*4096 : pages*3/4*4096])
		clear(want[pages*7/8*4096:])
		looked := make(chan bool, 1)
		go func() {
			z.do(order{Op: "drop", ID: c, Off: pages * 7 / 8 * 4096, N: pages / 8 * 4096}, nil)
			for off := int64(0); off < pages*4096; off += 32768 {
				if got := z.read(c, off, 32768); !bytes.Equal(got, want[off:off+32768]) {
					t.Errorf("version %d: wrong bytes behind %d", version, off)
				}
			}
			z.read(e, 0, 1)
			for p := int64(1); p < 512; p += 32 {
				z2.read(e, p*4096, 1) // resident, unless somebody pages it out just now, and not mapped there
			}
			looked <- true
		}()
		for done := false; !done; {
			select {
			case done = <-looked:
			case <-m.gone:
				m.died(true)
				alive = m.start("")
			}
		}
	}
	for _, name := range names {
		if t.Failed() || met[name] {
			continue
		}
		for _, nth := range []int{1 + rand.IntN(2)*rand.IntN(20), 1, 1, 1, 1} {
			if !m.start(fmt.Sprintf("%s=%d:kill", name, nth)) {
				m.start("")
				met[name] = true
			}
			meddle = name == "install.overwritten"
			process := m.cmd
			round()
			if m.cmd != process {
				met[name] = true
			}
			m.kill()
			if met[name] {
				break
			}
		}
	}
	m.start("")
	wg.Wait()
	m.check()
	for _, name := range names {
		if !met[name] {
			t.Errorf("nobody was killed at %s", name)
		}
	}
	t.Logf("killed at %d of %d failpoints, %d rounds", len(met), len(names), version)
}
