package daemon

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "sock")
	l, err := listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", st.Mode().Perm(), err)
	}
	if _, err := listen(path, ""); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second listener: %v", err)
	}
	c, err := net.Dial("unixpacket", path) // the second has not taken the socket away
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	l.SetUnlinkOnClose(false) // as if killed
	l.Close()
	l, err = listen(path, "0")
	if err != nil {
		t.Fatalf("where a dead pager listened: %v", err)
	}
	st, err = os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o660 || st.Sys().(*syscall.Stat_t).Gid != 0 {
		t.Errorf("mode %v, %v; want 0660 for group 0", st.Mode().Perm(), err)
	}
	l.Close()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
}

func TestListenRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(file, ""); !errors.Is(err, unix.EEXIST) {
		t.Errorf("over a file: %v", err)
	}
	if b, err := os.ReadFile(file); string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}
	if _, err := listen(filepath.Join(file, "sock"), ""); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("under a file: %v", err)
	}
	if _, err := listen(filepath.Join(t.TempDir(), "sock"), "no such group"); err == nil {
		t.Error("for a group that is not there")
	}
	if id, err := groupID("root"); id != 0 || err != nil {
		t.Errorf("group root is %d, %v", id, err)
	}
}
