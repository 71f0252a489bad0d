package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["nobody"] = nobodyTask
	tasks["serve"] = told(serveTask)
	tasks["tier"] = told(tierTask)
	tasks["children"] = withPager(children)
}

// nobody is the user and group without privileges.
const nobody = 65534

// nobodyTask runs the task that it is told, as nobody, in a mount namespace of its own, where /dev/userfaultfd is for everybody (device) or as it was. It
// hands its own standard input and output on: the test talks with the other one.
func nobodyTask(*conn) error {
	name, device := os.Getenv("E2E_TASK"), os.Getenv("E2E_DEVICE") != ""
	runtime.LockOSThread() // the namespace is the thread's, and the child's
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare the mount namespace (this test needs root): %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make all mounts private: %w", err)
	}
	if device {
		if err := shareDevice(); err != nil {
			return err
		}
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{argv0 + name}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	return cmd.Run()
}

// shareDevice puts a userfaultfd device that everybody may open in the place of /dev/userfaultfd, in this mount namespace only.
func shareDevice() error {
	var st unix.Stat_t
	if err := unix.Stat("/dev/userfaultfd", &st); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		return err
	}
	defer os.Remove(dir) // outside it is an empty directory
	if err := unix.Mount("none", dir, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	node := filepath.Join(dir, "userfaultfd")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(st.Rdev)); err != nil {
		return fmt.Errorf("make a device node: %w", err)
	}
	if err := os.Chmod(node, 0o666); err != nil { // whatever the umask
		return err
	}
	if err := unix.Mount(node, "/dev/userfaultfd", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind the device node: %w", err)
	}
	return unix.Unmount(dir, unix.MNT_DETACH)
}

// startNobody starts a task as nobody.
func startNobody(t *testing.T, name string, device bool) *task {
	t.Helper()
	return start(t, "nobody", func(c *exec.Cmd) {
		c.Env = append(os.Environ(), "E2E_TASK="+name)
		if device {
			c.Env = append(c.Env, "E2E_DEVICE=1")
		}
	})
}

// serveTask is spawn.Serve.
func serveTask(c *conn, config daemon.Config) error {
	return spawn.Serve(c.untilTold(), spawn.ServeOptions{Config: config, Ready: func(int) { c.send(true) }})
}

// serveAt starts a pager by spawn.Serve.
func serveAt(t *testing.T, config daemon.Config, as func(name string) *task) *task {
	t.Helper()
	k := as("serve")
	k.send(config)
	k.ready()
	return k
}

type tierArg struct {
	Socket       string // "": start a pager
	UserModeOnly bool
}

type tierResult struct {
	UID     int
	Tier    string
	Err     string // of Allocate
	Touch   bool   // plain touches work, through page-outs
	ReadAt  bool   // ReadAt and WriteAt do
	Syscall string // errno of read(2) into missing memory; "": it works
}

// tierTask finds out what works for it.
func tierTask(c *conn, arg tierArg) error {
	ctx := context.Background()
	res := tierResult{UID: os.Getuid()}
	var p *region.Pager
	var err error
	if arg.Socket == "" {
		p, err = startPager(ctx, spawn.Options{UserModeOnly: arg.UserModeOnly})
	} else {
		p, err = region.Dial(ctx, arg.Socket, &region.DialOptions{UserModeOnly: arg.UserModeOnly})
	}
	if err != nil {
		res.Err = err.Error()
		return c.send(res)
	}
	defer p.Close()
	info, err := p.Info(ctx)
	if err != nil {
		return err
	}
	res.Tier = info.Tier
	const size = 256 << 10
	r, err := p.Allocate(ctx, size, nil)
	if err != nil {
		res.Err = err.Error()
		return c.send(res)
	}
	want := make([]byte, size)
	fill(want, 0, 5)
	copy(r.Bytes(), want)
	if err := r.PageOut(ctx, 0, size); err != nil {
		return err
	}
	res.Touch = bytes.Equal(r.Bytes(), want)
	if err := r.PageOut(ctx, 0, size); err != nil {
		return err
	}
	got := make([]byte, size)
	if _, err := r.ReadAt(got, 0); err != nil {
		return fmt.Errorf("ReadAt: %w", err)
	}
	if err := r.PageOut(ctx, 0, size); err != nil {
		return err
	}
	if _, err := r.WriteAt(want[:100], 5000); err != nil {
		return fmt.Errorf("WriteAt: %w", err)
	}
	res.ReadAt = bytes.Equal(got, want) && bytes.Equal(r.Bytes()[5000:5100], want[:100])
	if err := r.PageOut(ctx, 0, size); err != nil {
		return err
	}
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer f.Close()
	var errno unix.Errno
	if _, err := unix.Pread(int(f.Fd()), r.Bytes()[8192:12288], 0); errors.As(err, &errno) {
		res.Syscall = unix.ErrnoName(errno)
	}
	return firstOf(c.send(res), p.Close())
}

// openDir is a directory that everybody may use.
func openDir(t *testing.T) string {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	// t.TempDir's parent is for everybody to pass, but the root of all temporary directories of this test may not be.
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestTiers runs pagers and tasks with the privileges of each tier. The machine's own sysctl and device stay as they are.
func TestTiers(t *testing.T) {
	if b, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd"); err == nil && strings.TrimSpace(string(b)) == "1" {
		t.Fatal("vm.unprivileged_userfaultfd is 1 here: nobody is unprivileged, and this test cannot show anything")
	}
	root := func(name string) *task { return start(t, name, nil) }
	asNobody := func(device bool) func(string) *task {
		return func(name string) *task { return startNobody(t, name, device) }
	}
	dir := openDir(t)
	full := tierResult{Touch: true, ReadAt: true}
	for _, c := range []struct {
		name  string
		serve func(name string) *task // nil: the task starts its own pager
		group string
		give  bool
		as    func(name string) *task
		arg   tierArg
		want  tierResult // of Err: a part
	}{
		{"A", nil, "", false, root, tierArg{}, tierResult{Tier: "A", Touch: true, ReadAt: true}},
		{"B", nil, "", false, asNobody(true), tierArg{}, tierResult{UID: nobody, Tier: "B", Touch: true, ReadAt: true}},
		{"neither", nil, "", false, asNobody(false), tierArg{}, tierResult{UID: nobody, Tier: "C", Err: "UserModeOnly"}},
		{"C", asNobody(false), "", false, asNobody(false), tierArg{UserModeOnly: true}, tierResult{UID: nobody, Tier: "C", Touch: true, ReadAt: true, Syscall: "EFAULT"}},
		{"C with a pager of its own", nil, "", false, asNobody(false), tierArg{UserModeOnly: true}, tierResult{UID: nobody, Tier: "C", Touch: true, ReadAt: true, Syscall: "EFAULT"}},
		{"C of root's pager", root, fmt.Sprint(nobody), false, asNobody(false), tierArg{UserModeOnly: true},
			tierResult{UID: nobody, Tier: "A", Touch: true, ReadAt: true, Syscall: "EFAULT"}},
		{"given the device", root, fmt.Sprint(nobody), true, asNobody(false), tierArg{}, tierResult{UID: nobody, Tier: "A", Touch: full.Touch, ReadAt: full.ReadAt}},
		{"not given the device", root, fmt.Sprint(nobody), false, asNobody(false), tierArg{}, tierResult{UID: nobody, Tier: "A", Err: "privilege"}},
		{"not in the group", root, "", true, asNobody(true), tierArg{}, tierResult{UID: nobody, Err: "--group"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			arg := c.arg
			if c.serve != nil {
				arg.Socket = filepath.Join(dir, strings.ReplaceAll(c.name, " ", "-")+".sock")
				server := serveAt(t, daemon.Config{Socket: arg.Socket, Group: c.group, GiveDevice: c.give}, c.serve)
				defer server.wait()
				st, err := os.Stat(arg.Socket)
				if err != nil {
					t.Fatal(err)
				}
				mode := os.FileMode(0o600)
				if c.group != "" {
					mode = 0o660
				}
				if st.Mode().Perm() != mode {
					t.Errorf("the socket's mode is %v, want %v", st.Mode().Perm(), mode)
				}
			}
			k := c.as("tier")
			k.send(arg)
			var got tierResult
			k.recv(&got)
			if !strings.Contains(got.Err, c.want.Err) || c.want.Err == "" && got.Err != "" {
				t.Errorf("error %q, want %q in it", got.Err, c.want.Err)
			}
			got.Err = c.want.Err
			if got != c.want {
				t.Errorf("got %+v\nwant %+v", got, c.want)
			}
			k.wait()
		})
	}
}

// children starts other programs from the middle of its faults: they must not have its memory, nor hold it up.
func children(ctx context.Context, p *region.Pager) error {
	const size = 1 << 20
	r, err := p.Allocate(ctx, size, nil)
	if err != nil {
		return err
	}
	want := make([]byte, size)
	fill(want, 0, 1)
	copy(r.Bytes(), want)
	flags, err := vmFlags(r.Bytes())
	if err != nil {
		return err
	}
	if !strings.Contains(flags, " dc ") {
		return fmt.Errorf("the mapping has flags %q: forked children would get it", flags)
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := r.PageOut(ctx, 0, size); err != nil {
				done <- err
				return
			}
			if i := firstDiff(r.Bytes(), want); i >= 0 {
				done <- fmt.Errorf("wrong contents at %d", i)
				return
			}
		}
	}()
	for range 50 {
		if out, err := exec.Command("/bin/true").CombinedOutput(); err != nil {
			return fmt.Errorf("a child: %w: %s", err, out)
		}
	}
	close(stop)
	return <-done
}

// vmFlags is what the kernel says of the mapping that b begins in.
func vmFlags(b []byte) (string, error) {
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return "", err
	}
	_, rest, ok := strings.Cut(string(smaps), fmt.Sprintf("\n%x-", addressOf(b)))
	if !ok {
		return "", errors.New("the memory is not in /proc/self/smaps")
	}
	_, rest, _ = strings.Cut(rest, "VmFlags:")
	line, _, _ := strings.Cut(rest, "\n")
	return line, nil
}

func TestChildren(t *testing.T) { run(t, "children", nil, nil, nil) }
