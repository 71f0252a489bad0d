//go:build linux

package region

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// roleEnv tells a child of the tests what to be.
const roleEnv = "MACHPAGER_REGION_TEST_ROLE"

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleEnv); role {
	case "":
	case "pager", "pager with device":
		runFake(role != "pager")
		os.Exit(0)
	default:
		os.Exit(runTask(role))
	}
	time.AfterFunc(3*time.Minute, func() {
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
		fmt.Fprintln(os.Stderr, "watchdog: the tests hang")
		os.Exit(3)
	})
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// sockets makes a connected pair of SOCK_SEQPACKET sockets.
func sockets(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
}

// child starts the test binary in a role, with a socket at fd 3, which it takes over.
func child(t testing.TB, role string, socket *os.File, cred *syscall.Credential) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{roleEnv + "=" + role, "GORACE=atexit_sleep_ms=0"}
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	socket.Close()
	return cmd
}

// startFake starts a fake pager and connects to it; everything is ended and counted at the end of the test.
func startFake(t *testing.T, o *ConnOptions) (*Pager, *exec.Cmd) {
	t.Helper()
	fds, maps := count(t, "/proc/self/fd"), mappings(t)
	ours, theirs := sockets(t)
	cmd := child(t, "pager", theirs, nil)
	uc, err := pairConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	p, err := FromConn(deadline(t), uc, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("close pager: %v", err)
		}
		cmd.Wait() // ends on the end of the connection; an error if it was killed
		if n := count(t, "/proc/self/fd"); n > fds {
			t.Errorf("%d file descriptors open, %d before", n, fds)
		}
		if after := mappings(t); after > maps {
			t.Errorf("%d mappings of objects, %d before", after, maps)
		}
		mapped.mu.RLock()
		defer mapped.mu.RUnlock()
		if len(mapped.list) != 0 {
			t.Errorf("%d regions are still known", len(mapped.list))
		}
	})
	return p, cmd
}

// deadline is a context that ends before the watchdog does.
func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func count(t *testing.T, dir string) int {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// mappings counts this process's mappings of memory objects.
func mappings(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "memfd:object")
}

// mapObject makes an object and maps it.
func mapObject(t *testing.T, p *Pager, size int64, o *ObjectOptions, m *MapOptions) *Region {
	t.Helper()
	object, err := p.ObjectCreate(deadline(t), size, o)
	if err != nil {
		t.Fatal(err)
	}
	r, err := object.Map(deadline(t), m)
	if err != nil {
		t.Fatal(err)
	}
	if err := object.Close(); err != nil {
		t.Fatal(err)
	}
	return r
}

// pattern is what a fresh object of the fake contains at [off, off+n).
func pattern(off, n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte((off+int64(i))/4096 + 1)
	}
	return b
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		i := 0
		for i < len(got) && i < len(want) && got[i] == want[i] {
			i++
		}
		t.Fatalf("%s: differs at %d of %d (want %d bytes)", what, i, len(got), len(want))
	}
}

// waitFaulting waits until n threads of this process wait in faults.
func waitFaulting(t *testing.T, n int) {
	t.Helper()
	got := 0
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		got = 0
		for _, task := range tasks {
			if b, err := os.ReadFile("/proc/self/task/" + task.Name() + "/wchan"); err == nil && string(b) == "handle_userfault" {
				got++
			}
		}
		if got == n {
			return
		}
	}
	t.Fatalf("%d threads wait in faults, want %d", got, n)
}
