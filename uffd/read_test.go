//go:build linux

package uffd

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Who has a copy of a userfaultfd can make it blocking under a reader. A Read must not wait all the same, where the kernel allows that (6.10).
func TestReadOfDescriptorMadeBlocking(t *testing.T) {
	u, err := Open(&OpenOptions{UserModeOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	var msgs [4]Msg
	if _, err := u.Read(msgs[:]); err != nil {
		t.Fatal(err)
	}
	if u.noNowait.Load() {
		t.Skip("kernel older than 6.10")
	}
	if err := unix.SetNonblock(u.Fd(), false); err != nil {
		t.Fatal(err)
	}
	neverWaits(t, u)

	// And who took it over while it was blocking.
	other, err := unix.Dup(u.Fd())
	if err != nil {
		t.Fatal(err)
	}
	o := FromFdNonblock(other)
	defer o.Close()
	if err := unix.SetNonblock(u.Fd(), false); err != nil {
		t.Fatal(err)
	}
	neverWaits(t, o)
}

func neverWaits(t *testing.T, u *FD) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		_, err := u.Read(make([]Msg, 4))
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("a Read waits")
	}
}

// A descriptor that is no userfaultfd says nothing about the kernel: the others go on with reads that cannot wait.
func TestReadOfSomethingElse(t *testing.T) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[1])
	p := FromFd(pipe[0])
	defer p.Close()
	u, err := Open(&OpenOptions{UserModeOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	var msgs [4]Msg
	p.Read(msgs[:]) // whatever it says
	if _, err := u.Read(msgs[:]); err != nil {
		t.Fatal(err)
	}
	if p.noNowait.Load() && u.noNowait.Load() {
		t.Skip("kernel older than 6.10")
	}
	if u.noNowait.Load() {
		t.Error("a pipe changed how a userfaultfd is read")
	}
}
