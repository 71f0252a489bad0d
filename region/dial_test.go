//go:build linux

package region

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
)

func TestDial(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sock")
	if _, err := Dial(deadline(t), path, nil); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "machpager serve") {
		t.Error(err)
	}
	t.Setenv(SocketEnv, filepath.Join(dir, "other"))
	if _, err := Dial(deadline(t), "", nil); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "other") {
		t.Error(err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if _, err := Dial(deadline(t), path, nil); !errors.Is(err, unix.ECONNREFUSED) || !strings.Contains(err.Error(), "ended") {
		t.Error(err)
	}
	// A pager that hangs up, and one of another version.
	for _, version := range []uint16{0, 9} {
		ours, theirs := sockets(t)
		uc, err := pairConn(ours)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := ipc.FileConn(theirs)
		raw := theirs
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			conn.Recv()
			if version != 0 {
				unix.Write(int(raw.Fd()), []byte{byte(version), 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}) // the reply to Hello
			}
			conn.Close()
			raw.Close()
		}()
		_, err = FromConn(deadline(t), uc, nil)
		if want := map[uint16]error{0: ErrPagerGone, 9: ipc.ErrVersion}[version]; !errors.Is(err, want) {
			t.Errorf("version %d: %v", version, err)
		}
	}
	stream, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(stream[1])
	uc, err := pairConn(os.NewFile(uintptr(stream[0]), "stream"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := FromConn(deadline(t), uc, nil); !errors.Is(err, unix.EPROTOTYPE) {
		t.Error(err)
	}
}

// An unprivileged task: with the pager's device it works in full, without it the error names the ways out, and user mode only works without both.
func TestUnprivilegedTask(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root, to start a task of another user")
	}
	for _, c := range []struct{ pager, task string }{{"pager with device", "task"}, {"pager", "task without permission"}, {"pager", "user mode task"}} {
		t.Run(c.task, func(t *testing.T) {
			ours, theirs := sockets(t)
			pager := child(t, c.pager, theirs, nil)
			task := child(t, c.task, ours, &syscall.Credential{Uid: 65534, Gid: 65534})
			kill := time.AfterFunc(30*time.Second, func() { task.Process.Kill() })
			defer kill.Stop()
			if err := task.Wait(); err != nil {
				t.Errorf("task: %v", err)
			}
			if err := pager.Wait(); err != nil {
				t.Errorf("pager: %v", err)
			}
		})
	}
}

// runTask is a task in a process of its own, with the pager's socket at fd 3.
func runTask(role string) int {
	fail := func(what string, err error) int {
		fmt.Fprintf(os.Stderr, "%s: %s: %v\n", role, what, err)
		return 1
	}
	uc, err := pairConn(os.NewFile(3, "socket"))
	if err != nil {
		return fail("socket", err)
	}
	p, err := FromConn(context.Background(), uc, &ConnOptions{DialOptions: DialOptions{UserModeOnly: role == "user mode task"}})
	if err != nil {
		return fail("connect", err)
	}
	defer p.Close()
	r, err := p.Allocate(context.Background(), 3*4096, &AllocateOptions{ObjectOptions: ObjectOptions{Arg: "b2"}})
	if role == "task without permission" {
		if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "UserModeOnly") || !strings.Contains(err.Error(), "sysctl") {
			return fail("allocate without permission", err)
		}
		return 0
	}
	if err != nil {
		return fail("allocate", err)
	}
	if r.Bytes()[0] != 1 {
		return fail("touch", fmt.Errorf("read %d", r.Bytes()[0]))
	}
	b := make([]byte, 4096)
	if n, err := r.ReadAt(b, 4095); n != 4096 || err != nil || b[0] != 1 || b[1] != 2 || b[4095] != 2 {
		return fail("ReadAt", fmt.Errorf("%d, %w", n, err))
	}
	if n, err := r.WriteAt([]byte{9, 9}, 4095); n != 2 || err != nil || r.Bytes()[4096] != 9 {
		return fail("WriteAt", fmt.Errorf("%d, %w", n, err))
	}
	var fe *FaultError
	if n, err := r.ReadAt(b, 8100); n != 92 || !errors.As(err, &fe) || fe.Offset != 8192 || !errors.Is(err, emm.MemoryError) {
		return fail("ReadAt of a bad page", fmt.Errorf("%d, %w", n, err))
	}
	if n, err := r.ReadAt(b, 8192); n != 4096 || err != nil || b[0] != 3 {
		return fail("ReadAt again", fmt.Errorf("%d, %w", n, err))
	}
	return 0
}
