package frames

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const nobody = 65534

func init() {
	children["frames-test-nobody"] = childNobody
	children["frames-test-reopen"] = childReopen
}

// runChild re-executes the test binary in a role, as an unprivileged user, with f as fd 3.
func runChild(t *testing.T, role string, f *os.File) string {
	t.Helper()
	var out, stderr bytes.Buffer
	cmd := exec.Cmd{Path: "/proc/self/exe", Args: []string{role}, Env: []string{}, Stdout: &out, Stderr: &stderr,
		SysProcAttr: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}}
	if f != nil {
		cmd.ExtraFiles = []*os.File{f}
	}
	must(t, cmd.Start())
	kill := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	defer kill.Stop()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s: %v\n%s%s", role, err, &out, &stderr)
	}
	return out.String()
}

// nobodyReport is what an unprivileged process can have.
type nobodyReport struct {
	Kind            string
	Extents, NoSwap bool
	Exact, Down, Up bool
	Again, ReadOnly bool
	TmpfsErrno      syscall.Errno
	Errors          []string
}

func childNobody() {
	var r nobodyReport
	check := func(ok *bool, fn func() error) {
		if err := fn(); err != nil {
			r.Errors = append(r.Errors, err.Error())
			return
		}
		*ok = true
	}
	_, err := Open(Options{Budget: 1 << 20, Kind: Tmpfs})
	errors.As(err, &r.TmpfsErrno)
	p, err := Open(Options{Budget: 1 << 20})
	if err != nil {
		r.Errors = append(r.Errors, err.Error())
		json.NewEncoder(os.Stdout).Encode(r)
		return
	}
	defer p.Close()
	r.Kind, r.Extents, r.NoSwap = p.Kind().String(), p.Extents(), p.NoSwap()
	f, err := p.NewFile(1 << 30)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	full := func(budget int64) error { // exactly so much fits
		if left, err := f.Punch(0, f.Size()); left != 0 || err != nil {
			return fmt.Errorf("punch: %d left, %w", left, err)
		}
		n, err := f.WriteAt(fill(int(budget)+PageSize, 1), 0)
		if int64(n) != budget || !errors.Is(err, unix.ENOSPC) {
			return fmt.Errorf("%d bytes fit, %w, want %d", n, err, budget)
		}
		if left, err := f.Punch(0, f.Size()); left != 0 || err != nil {
			return fmt.Errorf("punch: %d left, %w", left, err)
		}
		return nil
	}
	set := func(budget int64) error {
		if err := p.SetBudget(budget); err != nil {
			return err
		}
		return full(budget)
	}
	check(&r.Exact, func() error { return full(1 << 20) })
	check(&r.Down, func() error { return set(64 << 10) })
	check(&r.Up, func() error { return set(5 << 20) })
	check(&r.Again, func() error { // the fd for it used up: another helper makes a new one
		if err := unix.FsconfigSetString(p.mount.ctl, "size", "nonsense"); err == nil {
			return errors.New("size=nonsense was taken")
		}
		if _, err := f.WriteAt(fill(8192, 1), 0); err != nil {
			return err
		}
		unix.FsconfigSetString(p.mount.ctl, "size", "4096")
		if err := unix.FsconfigReconfigure(p.mount.ctl); err == nil {
			return errors.New("the size went below what is in use")
		}
		return set(3 << 20)
	})
	check(&r.ReadOnly, func() error {
		ro, err := f.ReadOnly()
		if err != nil {
			return err
		}
		defer ro.Close()
		d, err := f.Dup()
		if err != nil {
			return err
		}
		return d.Close()
	})
	json.NewEncoder(os.Stdout).Encode(r)
}

// An unprivileged user gets a tmpfs of his own with an exact budget that can be changed; only noswap is missing.
func TestUnprivileged(t *testing.T) {
	out := runChild(t, "frames-test-nobody", nil)
	var r nobodyReport
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want := nobodyReport{Kind: "tmpfs-userns", Extents: true, Exact: true, Down: true, Up: true, Again: true, ReadOnly: true, TmpfsErrno: unix.EPERM}
	if fmt.Sprint(r) != fmt.Sprint(want) {
		t.Errorf("got  %+v\nwant %+v", r, want)
	}
}

// childReopen tries to make a read-only descriptor writable.
func childReopen() {
	if _, err := os.OpenFile("/proc/self/fd/3", os.O_RDONLY, 0); err == nil {
		fmt.Print("readable ")
	}
	_, err := os.OpenFile("/proc/self/fd/3", os.O_RDWR, 0)
	fmt.Print(errors.Is(err, unix.EACCES))
}

// A task of another user that was given a file read-only cannot open it again for writing.
func TestReadOnlyStays(t *testing.T) {
	forKinds(t, 1<<20, kinds, func(t *testing.T, p *Pool) {
		ro, err := newFile(t, p, PageSize).ReadOnly()
		must(t, err)
		defer ro.Close()
		if got := runChild(t, "frames-test-reopen", ro); got != "true" {
			t.Errorf("another user: %q", got)
		}
	})
}

func TestNoMain(t *testing.T) {
	mainCalled.Store(false)
	defer mainCalled.Store(true)
	_, err := Open(Options{Budget: 1 << 20, Kind: TmpfsUserNS})
	wantErr(t, err, ErrNoMain)
}

// The helper role answers nonsense with an error and ends.
func TestHelperRefuses(t *testing.T) {
	var r helperReply
	_, err := helperCall(&helperRequest{Op: "nonsense"}, -1, 1, &r)
	wantErr(t, err, unix.EINVAL)
	_, err = helperCall(&helperRequest{Op: "mount", Size: -1}, -1, 2, &helperReply{})
	wantErr(t, err, unix.EINVAL)
	if _, err = helperCall(&helperRequest{Op: "pick"}, -1, 1, &helperReply{}); err == nil {
		t.Error("picked no mount")
	}
	_, err = helperCall(&helperRequest{Op: "mount", Size: 1 << 20}, -1, 1, &helperReply{}) // sends two
	wantErr(t, err, unix.EPROTO)

	// Without a socket on fd 3 it is an ordinary start of the program, and not the helper.
	cmd := exec.Cmd{Path: "/proc/self/exe", Args: []string{helperName, "-test.run=^$"}, Env: []string{}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	// A parent that is gone, and one that talks nonsense.
	for _, say := range []string{"", "{"} {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		theirs := os.NewFile(uintptr(pair[1]), "socket")
		var stderr bytes.Buffer
		cmd := exec.Cmd{Path: "/proc/self/exe", Args: []string{helperName}, Env: []string{}, ExtraFiles: []*os.File{theirs}, Stderr: &stderr}
		must(t, cmd.Start())
		theirs.Close()
		if say != "" {
			must(t, unix.Sendmsg(pair[0], []byte(say), nil, nil, unix.MSG_NOSIGNAL))
		}
		unix.Close(pair[0])
		err = cmd.Wait()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || stderr.Len() == 0 {
			t.Errorf("told %q: %v, %s", say, err, &stderr)
		}
	}
}
