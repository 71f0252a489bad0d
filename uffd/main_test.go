//go:build linux

package uffd

import (
	"bytes"
	"fmt"
	"os"
	"runtime/pprof"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests touch registered memory in two ways only: by system calls, which let go of the P while they wait, with the handler in the same
// process (touch_test.go); or by plain loads and stores in a child process, with the handler here (task_test.go).

func TestMain(m *testing.M) {
	if os.Args[0] == taskName {
		taskMain()
	}
	if os.Args[0] == keeperName {
		keeperMain()
	}
	keeper, err := startKeeper()
	if err != nil {
		fmt.Fprintln(os.Stderr, "uffd tests: without hugetlb:", err)
	}
	fds := openFDs()
	code := m.Run()
	left := openFDs()
	keeper.stop()
	if code == 0 && len(left) != len(fds) {
		fmt.Fprintf(os.Stderr, "FAIL: file descriptors left open: before %v, after %v\n", fds, left)
		code = 1
	}
	os.Exit(code)
}

// deadline is the longest a test may take.
const deadline = 30 * time.Second

// watch ends the whole process with all stacks if the test hangs.
func watch(t testing.TB) {
	t.Helper()
	timer := time.AfterFunc(deadline, func() {
		fmt.Fprintf(os.Stderr, "FAIL: %s hangs\n", t.Name())
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
		os.Exit(2)
	})
	t.Cleanup(func() { timer.Stop() })
}

func openFDs() map[string]string {
	fds := map[string]string{}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && to != "anon_inode:[eventpoll]" && to != "anon_inode:[eventfd]" {
			fds[e.Name()] = to
		}
	}
	return fds
}

var (
	hugeSize int64 // bytes of a default huge page
	haveHuge bool  // immutable once TestMain has started
)

func readInt(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
}

// meminfo returns a field of /proc/meminfo in bytes.
func meminfo(field string) (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if f := bytes.Fields(line); len(f) > 1 && string(f[0]) == field {
			n, err := strconv.ParseInt(string(f[1]), 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("no %s in /proc/meminfo", field)
}

// need skips the test on a kernel that is too old, and fails it when the probe fails.
func need(t testing.TB, err error) {
	t.Helper()
	switch {
	case err == nil:
	case isNotSupported(err):
		t.Skip(err)
	default:
		t.Fatal(err)
	}
}

func open(t testing.TB, o *OpenOptions) *FD {
	t.Helper()
	watch(t)
	u, err := Open(o)
	if err != nil {
		t.Fatalf("%v (these tests want root)", err)
	}
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	return u
}

func pollIn(fd int, timeout time.Duration) bool {
	end := time.Now().Add(timeout)
	for {
		left := max(time.Until(end), 0)
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(left.Milliseconds()))
		if err == nil {
			return n == 1 && p[0].Revents&unix.POLLIN != 0
		}
		if err != unix.EINTR {
			return false
		}
	}
}

// next returns the next message.
func next(t testing.TB, u *FD) *Msg {
	t.Helper()
	var m [1]Msg
	for range 100 {
		if !pollIn(u.Fd(), 10*time.Second) {
			t.Fatal("no message within 10 s")
		}
		switch n, err := u.Read(m[:]); {
		case err != nil:
			t.Fatal(err)
		case n == 1:
			return &m[0]
		}
	}
	t.Fatal("poll reports messages that read does not find")
	return nil
}

func nextFault(t testing.TB, u *FD, want FaultFlags, page uint64, pageSize uint64) *Msg {
	t.Helper()
	m := next(t, u)
	if m.Event() != EventPagefault || m.Flags() != want || m.Address()&^(pageSize-1) != page {
		t.Fatalf("got %v, want %v fault at %#x", m, want, page)
	}
	return m
}

func nextEvent(t testing.TB, u *FD, want Event) *Msg {
	t.Helper()
	m := next(t, u)
	if m.Event() != want {
		t.Fatalf("got %v, want %v", m, want)
	}
	return m
}
