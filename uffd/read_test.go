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
	var msgs [4]Msg
	if _, err := u.Read(msgs[:]); err != nil {
		t.Fatal(err)
	}
	if noNowait.Load() {
		t.Skip("this kernel is older than 6.10")
	}
	if err := unix.SetNonblock(u.Fd(), false); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := u.Read(msgs[:])
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
	u.Close()
}
