package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/uffd"
)

func init() { tasks["villain"] = told(villainTask) }

// villain is a task that speaks the protocol by hand, in a process of its own, and does there what no task should.
type villain struct {
	socket string
	l      *ipc.Link
	fd     *uffd.FD
	limit  time.Duration // of the whole attack
	say    func(string)  // tells the test something
}

// attacks by name. An attack returns when it has done its worst; its process lives on, with everything that it holds, until the test ends it.
var attacks = map[string]func(v *villain) error{}

type villainArg struct {
	Socket, Attack string
	For            time.Duration
}

func villainTask(c *conn, arg villainArg) error {
	f := attacks[arg.Attack]
	if f == nil {
		return fmt.Errorf("no attack %q", arg.Attack)
	}
	v, err := newVillain(arg.Socket, uffd.RequiredFeatures)
	if err != nil {
		return err
	}
	v.limit = arg.For
	v.say = func(s string) { fmt.Fprintln(os.Stderr, "villain:", s) }
	if err := c.send("begun"); err != nil {
		return err
	}
	if err := f(v); err != nil {
		return c.send(fmt.Sprintf("attack %s: %v", arg.Attack, err))
	}
	if err := c.send(""); err != nil {
		return err
	}
	c.await()
	return nil
}

// newVillain connects. The userfaultfd has the features f, whatever the pager is told.
func newVillain(socket string, f uffd.Features) (*villain, error) {
	conn, err := ipc.DialConn(context.Background(), socket)
	if err != nil {
		return nil, err
	}
	v := &villain{socket: socket, l: ipc.NewLink(conn, nil)}
	if v.fd, err = uffd.Open(&uffd.OpenOptions{Features: f}); err != nil {
		return nil, err
	}
	if err := v.do(ipc.TypeHello, ipc.Hello{}); err != nil {
		return nil, err
	}
	return v, v.do(ipc.TypeTaskUffd, ipc.TaskUffd{Features: uint64(uffd.RequiredFeatures)}, v.fd.Fd())
}

func (v *villain) call(typ ipc.Type, body any, fds ...int) (*ipc.Message, error) {
	return callByHand(v.l, 20*time.Second, typ, body, fds)
}

// do is a call whose reply does not matter.
func (v *villain) do(typ ipc.Type, body any, fds ...int) error {
	m, err := v.call(typ, body, fds...)
	if err == nil {
		m.Close()
	}
	return err
}

// answered is a call that must be answered, with an error or not.
func (v *villain) answered(typ ipc.Type, body any) error {
	if err := v.do(typ, body); errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%v %+v is not answered", typ, body)
	}
	return nil
}

func (v *villain) object(size int64) (uint64, error) {
	m, err := v.call(ipc.TypeObjectCreate, ipc.ObjectCreate{Size: size})
	if err != nil {
		return 0, err
	}
	defer m.Close()
	r, _, err := ipc.Decode[ipc.ObjectReply](m.Body)
	return r.Handle, err
}

// mapped is memory that the pager serves.
type mapped struct {
	handle, id, addr uint64
	size             int64
	file             int
}

// prepare maps and registers, and leaves MapReady to the caller.
func (v *villain) prepare(handle uint64, size int64) (mapped, error) {
	m, err := v.call(ipc.TypeMap, ipc.Map{Handle: handle, Size: size})
	if err != nil {
		return mapped{}, err
	}
	defer m.Close()
	r, _, err := ipc.Decode[ipc.MapReply](m.Body)
	if err != nil {
		return mapped{}, err
	}
	p := mapped{handle: handle, id: r.Mapping, size: size, file: m.TakeFD(0)}
	if p.addr, err = mmap(p.file, size, unix.MAP_SHARED|unix.MAP_NORESERVE); err != nil {
		return mapped{}, err
	}
	_, err = v.fd.Register(p.addr, uint64(size), uffd.RegisterMissing|uffd.RegisterMinor|uffd.RegisterWP)
	return p, err
}

func (v *villain) mapObject(size int64) (mapped, error) {
	h, err := v.object(size)
	if err != nil {
		return mapped{}, err
	}
	p, err := v.prepare(h, size)
	if err != nil {
		return mapped{}, err
	}
	return p, v.do(ipc.TypeMapReady, ipc.MapReady{Mapping: p.id, Address: p.addr})
}

// bytes are the mapping's, to be touched.
func (p mapped) bytes() []byte { return unsafe.Slice((*byte)(pointer(p.addr)), p.size) }

// write makes every page dirty, as long as the pager allows it.
func (p mapped) write() {
	b := p.bytes()
	for i := int64(0); i < p.size; i += 4096 {
		b[i] = 1
	}
}

func mmap(fd int, size int64, flags int) (uint64, error) {
	p, err := unix.MmapPtr(fd, 0, nil, uintptr(size), unix.PROT_READ|unix.PROT_WRITE, flags)
	return uint64(uintptr(p)), err
}

// pointer is for memory that the Go runtime knows nothing of.
func pointer(addr uint64) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&addr)) }

// startVillain starts an attack.
func startVillain(t *testing.T, socket, attack string, limit time.Duration) *task {
	t.Helper()
	k := start(t, "villain", nil)
	k.send(villainArg{Socket: socket, Attack: attack, For: limit})
	var s string
	k.recv(&s)
	if s != "begun" {
		t.Fatalf("attack %s: %s", attack, s)
	}
	return k
}

// rss is the resident memory of a process, its shared memory included, in bytes.
func rss(pid int) int64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	n, _ := strconv.ParseInt(f[1], 10, 64)
	return n * 4096
}

// info asks the pager.
func info(t *testing.T, socket string) ipc.InfoReply {
	t.Helper()
	conn, err := ipc.DialConn(context.Background(), socket)
	if err != nil {
		t.Fatal(err)
	}
	l := ipc.NewLink(conn, nil)
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var m *ipc.Message
	if m, err = l.Call(ctx, ipc.TypeHello, ipc.Hello{}, nil); err == nil {
		m.Close()
		m, err = l.Call(ctx, ipc.TypeInfo, ipc.Empty{}, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	r, _, err := ipc.Decode[ipc.InfoReply](m.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// neighbourLimit is what an attack may cost a neighbour at most, for writing 100 KiB, paging them out, and reading them back.
const neighbourLimit = 5 * time.Second

// TestHostile has one process attack the pager while another uses it. The neighbour must read the right bytes within a bounded time, during the attack, while the
// villain keeps what it has, and after its death. Then nothing of the villain is left.
func TestHostile(t *testing.T) {
	for _, c := range []struct {
		attack string
		limit  time.Duration
	}{
		{"huge object", 5 * time.Second},
		{"huge discard", 5 * time.Second},
		{"orphan file", 2 * time.Second},
		{"truncate dirty", 2 * time.Second},
		{"longer file", 2 * time.Second},
		{"event storm", 2 * time.Second},
		{"blocking", 2 * time.Second},
		{"connections", 5 * time.Second},
		{"objects", 10 * time.Second},
		{"mappings", 3 * time.Second},
		{"slow readers", 5 * time.Second},
		{"descriptors", 2 * time.Second},
		{"numbers", 10 * time.Second},
		{"lies", 2 * time.Second},
		{"in mid-fault", 2 * time.Second},
		{"closed socket", 3 * time.Second},
		{"stopped", 5 * time.Second},
		{"inherited", 2 * time.Second},
		{"wired", 5 * time.Second},
		{"discard under faults", 2 * time.Second},
		{"unregistered", 2 * time.Second},
		{"in flight", 2 * time.Second},
		{"forks", 2 * time.Second},
		{"execs", 3 * time.Second},
		{"registers again", 2 * time.Second},
		{"strange files", 3 * time.Second},
		{"leaves without end", 3 * time.Second},
		{"odd userfaultfds", 2 * time.Second},
		{"tricks", 2 * time.Second},
	} {
		t.Run(c.attack, func(t *testing.T) {
			switch c.attack {
			case "connections", "descriptors", "in flight", "slow readers", "closed socket", "strange files", "leaves without end", "objects":
				// Alone: the kernel counts what a user has in flight over all processes, and these use up what there is.
			default:
				t.Parallel() // most of the time is waiting
			}
			socket, k := pagerAt(t, pagerOptions{Resident: 16 << 20})
			b := newBystander(t, socket)
			b.check("nothing")
			if err := settledStandby(k.cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			family := descendants(k.cmd.Process.Pid)
			before := make([]holdings, len(family))
			for i, pid := range family {
				before[i] = holdingsOf(pid)
			}
			v := startVillain(t, socket, c.attack, c.limit)
			var worst time.Duration
			var most int64
			check := func(after string) {
				t.Helper()
				start := time.Now()
				b.check(after)
				d := time.Since(start)
				worst = max(worst, d)
				if d > neighbourLimit {
					t.Errorf("%s: the neighbour was held up for %v", after, d)
				}
				for _, pid := range family {
					most = max(most, rss(pid))
				}
			}
			var over atomic.Bool
			result := make(chan string, 1)
			go func() {
				var s string
				if err := v.c.recv(&s); err != nil {
					s = err.Error()
				}
				over.Store(true)
				result <- s
			}()
			for end := time.Now().Add(c.limit + 15*time.Second); !over.Load() && time.Now().Before(end) && !t.Failed(); {
				check("in " + c.attack)
			}
			if !over.Load() {
				t.Fatal("the attack does not come to its end")
			}
			if s := <-result; s != "" {
				t.Error(s)
			}
			for range 5 {
				check("with what is left of " + c.attack)
			}
			v.cmd.Process.Kill()
			<-v.exited
			check("after " + c.attack)
			var left ipc.InfoReply
			defer func() {
				if t.Failed() {
					t.Logf("left: %+v", left)
				}
			}()
			eventually(t, 8*time.Second, "the pager has forgotten the villain", func() bool {
				if left = info(t, socket); left.Tasks == 1 && left.Objects == 1 && left.Mappings == 1 && left.KernelResident <= left.Resident && left.Resident <= 26*4096 {
					return true
				}
				time.Sleep(100 * time.Millisecond)
				return false
			})
			for i, pid := range family {
				eventually(t, 5*time.Second, fmt.Sprintf("process %d holds what it did before: %+v, now %+v: %v", pid, before[i], holdingsOf(pid), fdsOf(pid)), func() bool {
					return holdingsOf(pid).FDs <= before[i].FDs+2
				})
			}
			t.Logf("the neighbour waited for at most %v; the pager had at most %d MiB\n%s", worst, most>>20, v.output())
			if most > 256<<20 {
				t.Errorf("the pager or its guardian had %d MiB resident", most>>20)
			}
			b.k.send(op{Kind: opEnd})
			b.k.wait()
		})
	}
}
