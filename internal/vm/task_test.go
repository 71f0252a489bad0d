package vm

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/uffd"
)

// The tests' tasks are processes: this test binary again, told what to do over a socket. They know nothing of region: raw mmap and register.

const taskRole = "vm-test-task"

func TestMain(m *testing.M) {
	switch os.Args[0] {
	case taskRole:
		taskMain()
		return
	case pagerRole:
		pagerMain()
		return
	}
	panicOnBug = true
	os.Exit(m.Run())
}

// order is one command to a task; the reply is a result.
type order struct {
	Op       string // map, read, write, stress, remap, unmap, drop, punch
	ID       int    // which mapping
	Off, N   int64
	Data     []byte `json:"-"` // of write; it goes behind the rest as it is: see pack
	ReadOnly bool
	Seconds  float64
	Seed     uint64
	Slot     int // stress: which of Slots interleaved 8-byte slots of each page this task owns
	Slots    int
	Threads  int
}

type result struct {
	Addr  uint64
	Data  []byte `json:"-"`
	Fault bool   // the touch ended in SIGBUS
	Err   string
	Wrong int64
	Ops   int64
}

// pack is an order or a result as one message: JSON, a line feed, contents. (Contents as JSON would take the race detector most of the test's time.)
func pack(v any, data []byte) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return append(append(b, '\n'), data...)
}

func unpack(b []byte, v any) (data []byte, err error) {
	head, data, _ := bytes.Cut(b, []byte{'\n'})
	return data, json.Unmarshal(head, v)
}

// task is the test's end of a task process.
type task struct {
	t    testing.TB
	cmd  *exec.Cmd
	conn *net.UnixConn
	*Task
	mu  sync.Mutex
	buf []byte // guarded by mu: of one result
}

func startTask(t testing.TB, v *VM) *task {
	t.Helper()
	x, fd := spawnTask(t)
	var err error
	if x.Task, err = v.NewTask(uffd.FromFd(fd), x.cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return x
}

// spawnTask starts a task's process and returns it with its userfaultfd, which is the caller's.
func spawnTask(t testing.TB) (*task, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := os.NewFile(uintptr(fds[0]), "task"), os.NewFile(uintptr(fds[1]), "test")
	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0] = taskRole
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	c, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	x := &task{t: t, cmd: cmd, conn: c.(*net.UnixConn), buf: make([]byte, 1<<17)}
	_, fd := recvFd(x.conn, x.buf)
	if fd < 0 {
		t.Fatal("task: no userfaultfd (run as root)")
	}
	t.Cleanup(func() {
		x.conn.Close()
		done := make(chan struct{})
		go func() { cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(3 * time.Second):
			cmd.Process.Kill()
			<-done
		}
		if x.Task != nil {
			x.Task.Close()
		}
	})
	return x, fd
}

// do sends an order and waits for its result; a task that does not answer is shown with all its stacks and fails the test.
func (x *task) do(o order, f *os.File) result {
	x.t.Helper()
	x.mu.Lock()
	defer x.mu.Unlock()
	var oob []byte
	if f != nil {
		oob = unix.UnixRights(int(f.Fd()))
	}
	if _, _, err := x.conn.WriteMsgUnix(pack(o, o.Data), oob, nil); err != nil {
		x.t.Fatalf("task: %v", err)
	}
	x.conn.SetReadDeadline(time.Now().Add(time.Duration(o.Seconds*float64(time.Second)) + 20*time.Second))
	n, err := x.conn.Read(x.buf)
	if err != nil {
		x.cmd.Process.Signal(syscall.SIGQUIT)
		time.Sleep(500 * time.Millisecond)
		x.t.Errorf("task does not answer %s: %v", o.Op, err)
		panic("task hangs")
	}
	var r result
	data, err := unpack(x.buf[:n], &r)
	if err != nil {
		x.t.Fatal(err)
	}
	r.Data = bytes.Clone(data)
	if r.Err != "" {
		x.t.Fatalf("task: %s: %s", o.Op, r.Err)
	}
	return r
}

// mapObject maps [off, off+size) and returns the mapping; id is how orders call it.
func (x *task) mapObject(o *Object, id int, off, size int64, ro bool) *Mapping {
	x.t.Helper()
	m, f, err := x.NewMapping(o, off, size, ro)
	if err != nil {
		x.t.Fatal(err)
	}
	r := x.do(order{Op: "map", ID: id, Off: m.Offset(), N: m.Size(), ReadOnly: ro}, f)
	f.Close()
	if err := m.Start(r.Addr); err != nil {
		x.t.Fatal(err)
	}
	return m
}

func (x *task) read(id int, off, n int64) []byte {
	x.t.Helper()
	r := x.do(order{Op: "read", ID: id, Off: off, N: n}, nil)
	if r.Fault {
		return nil
	}
	return r.Data
}

func (x *task) write(id int, off int64, b []byte) bool {
	x.t.Helper()
	return !x.do(order{Op: "write", ID: id, Off: off, Data: b}, nil).Fault
}

// recvFd receives a message into b, and the file that came with it, -1 if none.
func recvFd(c *net.UnixConn, b []byte) ([]byte, int) {
	oob := make([]byte, 64)
	n, on, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, -1
	}
	msgs, _ := unix.ParseSocketControlMessage(oob[:on])
	if len(msgs) == 0 {
		return b[:n], -1
	}
	fds, _ := unix.ParseUnixRights(&msgs[0])
	return b[:n], fds[0]
}

// taskMain is the task process.
func taskMain() {
	c, err := net.FileConn(os.NewFile(3, "test"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	conn := c.(*net.UnixConn)
	u, err := uffd.Open(&uffd.OpenOptions{Features: uffd.FeatureMissingShmem | uffd.FeatureMinorShmem | uffd.FeatureWriteProtectShmem | uffd.FeatureWriteProtect |
		uffd.FeatureExactAddress | uffd.FeatureThreadID | uffd.FeaturePoison | uffd.FeatureEventRemap})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	conn.WriteMsgUnix([]byte("uffd"), unix.UnixRights(u.Fd()), nil)
	mem, buf := map[int][]byte{}, make([]byte, 1<<17)
	for {
		b, fd := recvFd(conn, buf)
		if b == nil {
			os.Exit(0)
		}
		var o order
		var r result
		var err error
		if o.Data, err = unpack(b, &o); err != nil {
			r.Err = err.Error()
		} else if err := obey(u, mem, o, fd, &r); err != nil {
			r.Err = err.Error()
		}
		conn.Write(pack(r, r.Data))
	}
}

func obey(u *uffd.FD, mem map[int][]byte, o order, fd int, r *result) error {
	m := mem[o.ID]
	switch o.Op {
	case "map":
		prot, flags, mode := unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED, uffd.RegisterMissing|uffd.RegisterMinor|uffd.RegisterWP
		if o.ReadOnly {
			prot, flags, mode = unix.PROT_READ, unix.MAP_PRIVATE, uffd.RegisterMissing|uffd.RegisterMinor
		}
		b, err := unix.Mmap(fd, o.Off, int(o.N), prot, flags)
		if err != nil {
			return err
		}
		unix.Close(fd)
		unix.Madvise(b, unix.MADV_DONTFORK)
		r.Addr = uint64(uintptr(unsafe.Pointer(&b[0])))
		mem[o.ID] = b
		_, err = u.Register(r.Addr, uint64(o.N), mode)
		return err
	case "read":
		r.Data = make([]byte, o.N)
		r.Fault = faults(func() { copy(r.Data, m[o.Off:]) })
	case "write":
		r.Fault = faults(func() { copy(m[o.Off:], o.Data) })
	case "unmap":
		delete(mem, o.ID)
		return unix.Munmap(m)
	case "split": // into areas of the kernel's
		return unix.Madvise(m[o.Off:o.Off+o.N], unix.MADV_RANDOM)
	case "hole":
		_, _, e := unix.Syscall(unix.SYS_MUNMAP, uintptr(unsafe.Pointer(&m[o.Off])), uintptr(o.N), 0)
		if e != 0 {
			return e
		}
	case "drop":
		return unix.Madvise(m[o.Off:o.Off+o.N], unix.MADV_DONTNEED)
	case "remap":
		to, err := unix.Mmap(-1, 0, int(o.N), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		addr, _, e := unix.Syscall6(unix.SYS_MREMAP, uintptr(unsafe.Pointer(&m[o.Off])), uintptr(o.N), uintptr(o.N), unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uintptr(unsafe.Pointer(&to[0])), 0)
		if e != 0 {
			return e
		}
		r.Addr = uint64(addr)
		mem[o.ID+100] = to
	case "copies":
		copies(m, mem[o.ID+1], o, r)
	case "causal":
		// One value after the other, into many pages in turn: what is later in the turn is never newer than what is earlier.
		end := time.Now().Add(time.Duration(o.Seconds * float64(time.Second)))
		for v := uint64(1); time.Now().Before(end); v++ {
			for p := range o.N / 4096 {
				// In one piece: under the race detector PutUint64 is eight stores.
				atomic.StoreUint64((*uint64)(unsafe.Pointer(&m[p*4096+o.Off])), v)
			}
			r.Ops++
		}
	case "stress":
		stress(m, o, r)
	default:
		return errors.New("unknown order " + o.Op)
	}
	return nil
}

func faults(fn func()) (fault bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if e := recover(); e != nil {
			fault = true
		}
	}()
	fn()
	return false
}

// copies has many goroutines copy between two regions, both sides misaligned, so that one instruction may need four pages, and checks what arrives.
func copies(src, dst []byte, o order, r *result) {
	var wg sync.WaitGroup
	var wrong atomic.Int64
	strip := len(src) / o.Threads
	for th := range o.Threads {
		wg.Go(func() {
			s, d := src[th*strip:][:strip], dst[th*strip:][:strip]
			b := make([]byte, strip-300)
			for i := range b {
				b[i] = byte(i*th + i>>8)
			}
			for range o.Slots {
				copy(s[100:], b[:len(b)-200])
				copy(d[297:], s[100:][:len(b)-200])
				if !bytes.Equal(d[297:][:len(b)-200], b[:len(b)-200]) {
					wrong.Add(1)
				}
				clear(d)
			}
		})
	}
	wg.Wait()
	r.Wrong = wrong.Load()
}

// stress works on the slots of m that belong to this task, in several threads, and checks every value it reads; Data is the size of a page as a little-endian
// number. Each thread keeps to its own slots, so it alone knows what is there.
func stress(m []byte, o order, r *result) {
	pages := int(o.N / 4096)
	var wrong, ops atomic.Int64
	end := time.Now().Add(time.Duration(o.Seconds * float64(time.Second)))
	var wg sync.WaitGroup
	total := o.Slots * o.Threads
	for th := range o.Threads {
		wg.Go(func() {
			mine := o.Slot*o.Threads + th
			rng := rand.New(rand.NewPCG(o.Seed, uint64(mine)))
			want := make([]uint64, pages)
			buf := make([]byte, 8)
			for i := uint64(1); time.Now().Before(end); i++ {
				for range 16 {
					p := rng.IntN(pages)
					at := m[p*4096+(p%7*total+mine)*8:][:8]
					switch rng.IntN(3) {
					case 0:
						want[p] = i<<16 | uint64(mine+1)
						binary.LittleEndian.PutUint64(at, want[p])
					case 1:
						want[p] = i<<16 | uint64(mine+1) | 1<<63
						binary.LittleEndian.PutUint64(buf, want[p])
						copy(at, buf)
					default:
						if got := binary.LittleEndian.Uint64(at); got != want[p] {
							if wrong.Add(1) < 4 {
								fmt.Fprintf(os.Stderr, "task slot %d page %d: got %#x, want %#x\n", mine, p, got, want[p])
							}
						}
					}
					ops.Add(1)
				}
			}
			for p := range pages {
				if got := binary.LittleEndian.Uint64(m[p*4096+(p%7*total+mine)*8:]); got != want[p] {
					if wrong.Add(1) < 4 {
						fmt.Fprintf(os.Stderr, "task slot %d page %d at the end: got %#x, want %#x\n", mine, p, got, want[p])
					}
				}
			}
		})
	}
	wg.Wait()
	r.Wrong, r.Ops = wrong.Load(), ops.Load()
}

type uffdMsg = uffd.Msg

func uffdFrom(fd int) *uffd.FD {
	unix.SetNonblock(fd, true)
	return uffd.FromFd(fd)
}

// waitReadable waits until a message is in the userfaultfd.
func waitReadable(t *testing.T, fd int) {
	t.Helper()
	unix.SetNonblock(fd, true)
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000); n != 1 {
		t.Fatalf("no message: %v", err)
	}
}
