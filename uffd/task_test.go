//go:build linux

package uffd

import (
	"encoding/gob"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// taskName is argv[0] of the child process that plays a task: it maps and registers memory, and touches it as ordinary programs do. The
// test, in another process, has a copy of the userfaultfd and answers.
const taskName = "uffd-test-task"

type order struct {
	Op   string
	Args [4]uint64
	Kind string
}

type reply struct {
	Val     uint64
	Sigbus  bool
	Refused string // what Open or a probe said
	Err     string // the order could not be obeyed
}

// task is the test's end.
type task struct {
	cmd     *exec.Cmd
	orders  *gob.Encoder
	replies chan reply
	mem     memory
	uffd    *FD // a copy of the task's
}

// taskCommand is this test binary as a task.
func taskCommand() *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{taskName}
	cmd.Stderr = os.Stderr
	return cmd
}

func startCommand(t testing.TB, cmd *exec.Cmd) *task {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &task{cmd: cmd, orders: gob.NewEncoder(in), replies: make(chan reply, 1)}
	received := make(chan struct{})
	go func() {
		defer close(received)
		defer close(c.replies)
		for d := gob.NewDecoder(out); ; {
			var r reply
			if d.Decode(&r) != nil {
				return
			}
			c.replies <- r
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		for range c.replies { // the receiver must not hang on a reply nobody wants
		}
		<-received
		cmd.Wait()
	})
	return c
}

// startTask starts a task that has registered memory of a kind.
func startTask(t testing.TB, k kind, o OpenOptions, mode RegisterMode) *task {
	t.Helper()
	watch(t)
	c := startCommand(t, taskCommand())
	c.mem = memory{addr: c.do(t, order{Op: "map", Kind: k.name}).Val, page: k.pageSize(), size: pages * k.pageSize(), file: -1, kind: k}
	fd := c.do(t, order{Op: "open", Args: [4]uint64{uint64(o.Features)}}).Val
	pidfd, err := unix.PidfdOpen(c.cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	own, err := unix.PidfdGetfd(pidfd, int(fd), 0)
	if err != nil {
		t.Fatal(err)
	}
	c.uffd = FromFd(own)
	t.Cleanup(func() {
		if err := c.uffd.Close(); err != nil {
			t.Error(err)
		}
	})
	c.do(t, order{Op: "register", Args: [4]uint64{c.mem.addr, c.mem.size, uint64(mode)}})
	return c
}

// send gives an order; reply or ok takes the answer.
func (c *task) send(t testing.TB, op string, args ...uint64) {
	t.Helper()
	o := order{Op: op}
	copy(o.Args[:], args)
	if err := c.orders.Encode(o); err != nil {
		t.Fatal(err)
	}
}

func (c *task) reply(t testing.TB) reply {
	t.Helper()
	select {
	case r, ok := <-c.replies:
		if !ok {
			t.Fatal("the task ended")
		}
		if r.Err != "" {
			t.Fatalf("task: %s", r.Err)
		}
		return r
	case <-time.After(10 * time.Second):
		t.Fatal("no reply from the task within 10 s")
	}
	panic("unreachable")
}

func (c *task) waits(t testing.TB) {
	t.Helper()
	select {
	case r := <-c.replies:
		t.Fatalf("task did not wait: %+v", r)
	case <-time.After(20 * time.Millisecond):
	}
}

func (c *task) do(t testing.TB, o order) reply {
	t.Helper()
	if err := c.orders.Encode(o); err != nil {
		t.Fatal(err)
	}
	return c.reply(t)
}

// taskMain is the child's main.
func taskMain() {
	runtime.LockOSThread() // the thread that gettid names, and that fork copies
	in, out := gob.NewDecoder(os.Stdin), gob.NewEncoder(os.Stdout)
	var s taskState
	for {
		var o order
		if in.Decode(&o) != nil {
			os.Exit(0)
		}
		r, err := s.obey(o)
		if err != nil {
			r.Err = fmt.Sprintf("%s: %v", o.Op, err)
		}
		if out.Encode(r) != nil {
			os.Exit(0)
		}
	}
}

type taskState struct {
	uffd   *FD
	forked struct {
		pid           int
		goOn, results [2]int
	}
}

func (s *taskState) obey(o order) (r reply, err error) {
	a := o.Args
	var errno unix.Errno
	var val uintptr
	switch o.Op {
	case "map":
		k := slices.IndexFunc(allKinds, func(k kind) bool { return k.name == o.Kind })
		if allKinds[k].hugetlb {
			if hugeSize, err = meminfo("Hugepagesize:"); err != nil {
				return r, err
			}
		}
		m, err := allKinds[k].mapMemory(pages * allKinds[k].pageSize())
		if err != nil {
			return r, err
		}
		r.Val = m.addr
	case "open": // features, user mode only, device
		o := OpenOptions{Features: Features(a[0]), UserModeOnly: a[1] != 0}
		if a[2] != 0 {
			o.Device = os.NewFile(uintptr(a[2]), DevicePath)
		}
		if u, err := Open(&o); err != nil {
			r.Refused = err.Error()
		} else {
			s.uffd, r.Val = u, uint64(u.Fd())
		}
	case "have":
		if err := HaveRequired(); err != nil {
			r.Refused = err.Error()
		}
	case "register":
		_, err = s.uffd.Register(a[0], a[1], RegisterMode(a[2]))
	case "tid":
		r.Val = uint64(unix.Gettid())
	case "load":
		var v byte
		v, r.Sigbus = load(a[0])
		r.Val = uint64(v)
	case "store":
		r.Sigbus = store(a[0], byte(a[1]))
	case "madvise":
		errno = madvise(a[0], a[1], int(a[2]))
	case "munmap":
		errno = munmap(a[0], a[1])
	case "mremap": // old address, size, new address
		val, _, errno = unix.Syscall6(unix.SYS_MREMAP, uintptr(a[0]), uintptr(a[1]), uintptr(a[1]), unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uintptr(a[2]), 0)
		r.Val = uint64(val)
	case "fork":
		r.Val, err = s.fork(a[0])
	case "child": // let the child go on: what it read
		r.Val, err = s.child()
	default:
		return r, fmt.Errorf("unknown order")
	}
	if err == nil && errno != 0 {
		err = errno
	}
	return r, err
}

// fork makes a real fork, of which only system calls run: the child waits for a byte, writes 8 bytes at addr to a pipe, and exits.
func (s *taskState) fork(addr uint64) (uint64, error) {
	f := &s.forked
	if err := unix.Pipe2(f.goOn[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	if err := unix.Pipe2(f.results[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	var b [8]byte
	pid, errno := forkChild(f.goOn[0], f.results[1], addr, &b)
	unix.Close(f.results[1])
	unix.Close(f.goOn[0])
	f.pid = pid
	if errno != 0 {
		return 0, errno
	}
	return uint64(pid), nil
}

func (s *taskState) child() (uint64, error) {
	f := &s.forked
	defer unix.Close(f.goOn[1])
	defer unix.Close(f.results[0])
	if _, err := unix.Write(f.goOn[1], []byte{1}); err != nil {
		return 0, err
	}
	var got [8]byte
	n, err := unix.Read(f.results[0], got[:])
	if err != nil {
		return 0, err
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(f.pid, &status, 0, nil); err != nil {
		return 0, err
	}
	if n != len(got) || status != 0 {
		return 0, fmt.Errorf("the forked child read %d bytes and ended with %v", n, status)
	}
	return uint64(got[0]), nil
}
