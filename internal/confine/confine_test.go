package confine

import (
	"encoding/gob"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// confined is argv[0] of a child that confines itself, tries what it may still do, and tells.
const confined = "confine-test"

func TestMain(m *testing.M) {
	if os.Args[0] == confined {
		if err := gob.NewEncoder(os.Stdout).Encode(try(os.Args[1])); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// result is what came of each thing that was tried: "" or an error.
type result map[string]string

// try confines this process to dir and a mount of its own.
func try(dir string) result {
	r := result{}
	note := func(what string, err error) {
		r[what] = ""
		if err != nil {
			r[what] = err.Error()
		}
	}
	other, err := os.CreateTemp("", "opened before")
	if err != nil {
		note("prepare", err)
		return r
	}
	defer os.Remove(other.Name())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		note("prepare", err)
		return r
	}
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	mount := -1
	if err == nil {
		mount, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	}
	note("make a mount", err)

	err = Capabilities()
	note("give up capabilities", err)
	r["held"] = Held()
	err = Files([]Rule{{Path: dir, Access: Read | Write}, {Dir: mount, Access: Read | Write}, {Path: "/proc", Access: Read}})
	note("confine files", err)
	if err != nil {
		return r
	}

	open := func(path string, flags int) error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	note("open /etc/passwd", open("/etc/passwd", unix.O_RDONLY))
	note("open /etc/passwd by /proc", open("/proc/self/root/etc/passwd", unix.O_RDONLY))
	note("open a file in the directory", open(dir, unix.O_TMPFILE|unix.O_RDWR))
	note("make a name in the directory", open(filepath.Join(dir, "name"), unix.O_CREAT|unix.O_RDWR))
	note("open a file elsewhere", open(os.TempDir(), unix.O_TMPFILE|unix.O_RDWR))
	fd, err := unix.Openat(mount, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	note("open a file on the mount", err)
	note("make it longer", unix.Ftruncate(fd, 1<<20))
	note("open it again", open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDWR))
	note("open it again to read", open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY))
	mem, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	note("make a memory file", err)
	note("open that again", open(fmt.Sprintf("/proc/self/fd/%d", mem), unix.O_RDWR))
	_, err = other.WriteString("still open")
	note("write what was open", err)
	note("read /proc", open("/proc/self/stat", unix.O_RDONLY))
	note("look at the parent", open(fmt.Sprintf("/proc/%d/stat", os.Getppid()), unix.O_RDONLY))
	note("look into the parent", open(fmt.Sprintf("/proc/%d/environ", os.Getppid()), unix.O_RDONLY))
	note("execute", exec.Command("/bin/true").Run())
	_, err = net.Dial("tcp", l.Addr().String())
	note("connect", err)
	note("mount", unix.Mount("none", dir, "tmpfs", 0, ""))

	// All threads, those that were there and those to come.
	var mu sync.Mutex
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			runtime.LockOSThread() // not unlocked: a thread for each
			err := open("/etc/passwd", unix.O_RDONLY)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				r["a thread opens /etc/passwd"] = "yes"
			}
			if Held() != "none" {
				r["a thread has capabilities"] = Held()
			}
		})
	}
	all.Wait()
	return r
}

// TestConfined says what a confined process can do, and what it cannot.
func TestConfined(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("/proc/self/exe", dir)
	cmd.Args[0] = confined
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var r result
	if err := gob.NewDecoder(out).Decode(&r); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if linkedWithCgo {
		for _, what := range []string{"give up capabilities", "confine files"} {
			if abi, _ := ABI(); !strings.Contains(r[what], "linked with cgo") && !(what == "confine files" && abi >= tsyncABI) {
				t.Errorf("%s, with threads nobody knows: %q", what, r[what])
			}
		}
		return
	}
	for _, what := range []string{"make a mount", "give up capabilities", "confine files", "open a file in the directory", "open a file on the mount", "make it longer",
		"open it again", "open it again to read", "make a memory file", "open that again", "write what was open", "read /proc", "look at the parent"} {
		if e, ok := r[what]; e != "" || !ok {
			t.Errorf("%s: %q", what, e)
		}
	}
	for _, what := range []string{"open /etc/passwd", "open /etc/passwd by /proc", "make a name in the directory", "open a file elsewhere", "look into the parent", "execute",
		"connect", "mount"} {
		if r[what] == "" {
			t.Errorf("%s: nobody says no", what)
		}
	}
	for _, what := range []string{"a thread opens /etc/passwd", "a thread has capabilities"} {
		if r[what] != "" {
			t.Errorf("%s: %s", what, r[what])
		}
	}
	if r["held"] != "none" {
		t.Errorf("capabilities: %s", r["held"])
	}
	if t.Failed() {
		for what, e := range r {
			t.Logf("%s: %q", what, e)
		}
	}
}

// TestUnknownAccess: a rule for what this kernel's landlock does not know is refused, not forgotten.
func TestUnknownAccess(t *testing.T) {
	abi, err := ABI()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newRuleset(abi, []Rule{{Path: "/", Access: 1 << 40}}); !errors.Is(err, unix.EINVAL) {
		t.Error(err)
	}
	if _, err := newRuleset(abi, []Rule{{Path: "/nonexistent", Access: Read}}); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
}
