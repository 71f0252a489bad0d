//go:build linux

package uffd

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestHandshake checks what the kernel refuses, and that it takes place once only.
func TestHandshake(t *testing.T) {
	raw := func() int {
		fd, err := create(&OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	if _, _, errno := ioctlAPI(raw(), 0, 0); errno != unix.EINVAL {
		t.Errorf("a wrong API version: %v", errno)
	}
	if f, i, errno := ioctlAPI(raw(), apiVersion, 1<<63); errno != unix.EINVAL || f != 0 || i != 0 {
		t.Errorf("an unknown feature: %v, features %v, ioctls %#x", errno, f, i)
	}
	if _, errno := ioctlRegister(raw(), 0x10000, 0x1000, RegisterMissing); errno != unix.EINVAL {
		t.Errorf("register before the handshake: %v", errno)
	}
	if _, errno := readMsgs(raw(), make([]Msg, 1)); errno != unix.EINVAL {
		t.Errorf("read before the handshake: %v", errno)
	}
	fd := raw()
	f, i, errno := ioctlAPI(fd, apiVersion, 0)
	if errno != 0 || f&FeatureMissingShmem == 0 || i&^0 != IoctlRegister|IoctlUnregister|IoctlAPI {
		t.Errorf("handshake: %v, features %v, ioctls %#x", errno, f, i)
	}
	if _, _, errno := ioctlAPI(fd, apiVersion, FeatureMissingShmem); errno != unix.EINVAL {
		t.Errorf("a second handshake: %v", errno)
	}
}

func TestOpen(t *testing.T) {
	dev, err := os.OpenFile(DevicePath, os.O_RDWR, 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // Linux 6.1
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		o    *OpenOptions
	}{
		{"nil", nil},
		{"features", &OpenOptions{Features: FeatureMissingShmem | FeatureEventRemap}},
		{"user mode only", &OpenOptions{UserModeOnly: true}},
		{"blocking", &OpenOptions{Blocking: true}},
		{"device", &OpenOptions{Device: dev, Features: FeatureMissingShmem}},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := open(t, c.o)
			var o OpenOptions
			if c.o != nil {
				o = *c.o
			}
			if u.Features() != o.Features {
				t.Errorf("features %v, want %v", u.Features(), o.Features)
			}
			fl, _ := unix.FcntlInt(uintptr(u.Fd()), unix.F_GETFL, 0)
			if blocking := fl&unix.O_NONBLOCK == 0; blocking != o.Blocking {
				t.Errorf("blocking: %v, want %v", blocking, o.Blocking)
			}
			if fd, _ := unix.FcntlInt(uintptr(u.Fd()), unix.F_GETFD, 0); fd&unix.FD_CLOEXEC == 0 {
				t.Error("not close-on-exec")
			}
			m := anon.memory(t)
			register(t, u, m, RegisterMissing)
			if err := u.Unregister(m.addr, m.size); err != nil {
				t.Error(err)
			}
		})
	}
	if dev != nil {
		dev.Close()
		if u, err := Open(&OpenOptions{Device: dev}); !errors.Is(err, os.ErrClosed) {
			t.Errorf("a closed device: %v, %v", u, err)
		}
	}
}

func TestOpenOptional(t *testing.T) {
	u := open(t, &OpenOptions{Features: FeatureThreadID, Optional: FeatureMissingShmem | 1<<60})
	if want := FeatureThreadID | FeatureMissingShmem; u.Features() != want {
		t.Errorf("features %v, want %v", u.Features(), want)
	}
}

func TestOpenNotSupported(t *testing.T) {
	_, err := Open(&OpenOptions{Features: FeatureMissingShmem | 1<<60})
	if !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), "0x1000000000000000") || strings.Contains(err.Error(), "SHMEM") {
		t.Errorf("an unknown feature: %v", err)
	}
}

func TestOpenWrongDevice(t *testing.T) {
	dev, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if _, err := Open(&OpenOptions{Device: dev}); !errors.Is(err, unix.ENOTTY) || !strings.Contains(err.Error(), DevicePath) {
		t.Errorf("/dev/null as device: %v", err)
	}
}

// TestOpenUnprivileged opens without privilege, in a process of another user: refused with the remedy, but for user mode only and
// for a device that was received open.
func TestOpenUnprivileged(t *testing.T) {
	watch(t)
	if n, err := readInt("/proc/sys/vm/unprivileged_userfaultfd"); err != nil || n != 0 {
		t.Logf("vm.unprivileged_userfaultfd is %d (%v): everybody may open", n, err)
	}
	dev, err := os.OpenFile(DevicePath, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	cmd := taskCommand()
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.ExtraFiles = []*os.File{dev} // fd 3
	c := startCommand(t, cmd)
	if r := c.do(t, order{Op: "open"}); r.Val != 0 || !strings.Contains(r.Refused, "CAP_SYS_PTRACE") ||
		!strings.Contains(r.Refused, DevicePath) || !strings.Contains(r.Refused, "vm.unprivileged_userfaultfd") {
		if n, _ := readInt("/proc/sys/vm/unprivileged_userfaultfd"); n == 0 {
			t.Errorf("opened without privilege: %+v", r)
		}
	}
	if r := c.do(t, order{Op: "open", Args: [4]uint64{0, 1}}); r.Refused != "" {
		t.Errorf("user mode only: %s", r.Refused)
	}
	if r := c.do(t, order{Op: "open", Args: [4]uint64{uint64(RequiredFeatures), 0, 3}}); r.Refused != "" {
		t.Errorf("by a received device: %s", r.Refused)
	}
	if r := c.do(t, order{Op: "have"}); r.Refused != "" && HaveRequired() == nil {
		t.Errorf("HaveRequired without privilege: %s", r.Refused)
	}
}

// TestUserModeOnly shows the limit of the mode: a system call that meets a missing page fails.
func TestUserModeOnly(t *testing.T) {
	u := open(t, &OpenOptions{UserModeOnly: true})
	m := anon.memory(t)
	register(t, u, m, RegisterMissing)
	if _, err := pipeFrom(m.at(0)); err != unix.EFAULT {
		t.Errorf("write(2) from a missing page: %v", err)
	}
}

func TestHave(t *testing.T) {
	probes := map[string]func() error{
		"write-protect": HaveWriteProtect, "fork": HaveEventFork, "remap": HaveEventRemap, "remove": HaveEventRemove,
		"missing hugetlb": HaveMissingHugetlb, "missing shmem": HaveMissingShmem, "unmap": HaveEventUnmap, "sigbus": HaveSigbus,
		"thread id": HaveThreadID, "minor hugetlb": HaveMinorHugetlb, "minor shmem": HaveMinorShmem, "exact address": HaveExactAddress,
		"write-protect shmem": HaveWriteProtectShmem, "wp unpopulated": HaveWPUnpopulated, "poison": HavePoison, "wp async": HaveWPAsync,
		"move": HaveMove, "continue wp": HaveContinueWP, "pagemap scan": HavePagemapScan, "required": HaveRequired,
	}
	for name, have := range probes {
		err := have()
		if err != nil && !errors.Is(err, ErrNotSupported) {
			t.Errorf("%s: %v", name, err)
		}
		if again := have(); (again == nil) != (err == nil) {
			t.Errorf("%s: first %v, then %v", name, err, again)
		}
	}
	err := Have(FeaturePoison | 1<<50)
	if HavePoison() == nil && (err == nil || strings.Contains(err.Error(), "POISON")) {
		t.Errorf("an unknown feature beside a known: %v", err)
	}
	if err := featureTableErr(); err != "" {
		t.Error(err)
	}
}

func featureTableErr() string {
	var all Features
	for _, f := range featureTable {
		if all&f.bit != 0 {
			return f.name + " twice"
		}
		all |= f.bit
		if err := f.bit.missing(); !strings.Contains(err.Error(), f.name) || !strings.Contains(err.Error(), f.kernel) || !isNotSupported(err) {
			return "unclear: " + err.Error()
		}
	}
	if all != 1<<17-1 {
		return "features without a name: " + (all ^ (1<<17 - 1)).String()
	}
	return ""
}

// TestProbeCache shows that a failed probe is tried again, and a conclusive one is not.
func TestProbeCache(t *testing.T) {
	tries, works, fails := 0, false, error(unix.EMFILE)
	p := probe{name: "X", kernel: "9.9", try: func() (bool, error) { tries++; return works, fails }}
	if err := p.have(); !errors.Is(err, unix.EMFILE) || isNotSupported(err) {
		t.Errorf("a failed probe: %v", err)
	}
	fails = nil
	for range 2 {
		if err := p.have(); !isNotSupported(err) || !strings.Contains(err.Error(), "X (Linux 9.9)") {
			t.Errorf("not there: %v", err)
		}
	}
	if tries != 2 {
		t.Errorf("%d tries, want 2", tries)
	}
}

func TestFromFd(t *testing.T) {
	u := open(t, nil)
	fd, err := unix.FcntlInt(uintptr(u.Fd()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	v := FromFd(fd)
	if v.Features() != 0 || v.Fd() != fd {
		t.Errorf("features %v, fd %d", v.Features(), v.Fd())
	}
	m := anon.memory(t)
	register(t, v, m, RegisterMissing)
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor after Close: %v", err)
	}
	if done, err := u.Copy(m.at(0), fill(m.page, 1), 0); err != nil { // the first copy still holds the registration
		t.Errorf("copy through the other descriptor: %d, %v", done, err)
	}
}

// TestCloseWaits holds a call open by hand.
func TestCloseWaits(t *testing.T) {
	u := open(t, nil)
	if !u.acquire() {
		t.Fatal("closed")
	}
	closed := make(chan error, 2)
	for range 2 {
		go func() { closed <- u.Close() }()
	}
	for u.users.Load() >= 0 {
		time.Sleep(time.Millisecond)
	}
	select {
	case <-closed:
		t.Fatal("Close did not wait for the call under way")
	case <-time.After(20 * time.Millisecond):
	}
	if _, err := unix.FcntlInt(uintptr(u.Fd()), unix.F_GETFD, 0); err != nil {
		t.Fatalf("the descriptor was closed under a call: %v", err)
	}
	if err := u.Wake(0x10000, 0x1000); !errors.Is(err, os.ErrClosed) || !errors.Is(err, unix.EBADF) {
		t.Errorf("a call that begins after Close: %v", err)
	}
	u.done()
	for range 2 {
		if err := <-closed; err != nil {
			t.Error(err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(u.Fd()), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor after Close: %v", err)
	}
}

// TestCloseConcurrent closes while others call; a call either works or says closed.
func TestCloseConcurrent(t *testing.T) {
	for range 20 {
		u := open(t, nil)
		m := anon.memory(t)
		register(t, u, m, RegisterMissing)
		errs := make(chan error)
		for range 8 {
			go func() {
				for {
					if err := u.Wake(m.addr, m.size); err != nil {
						errs <- err
						return
					}
				}
			}()
		}
		time.Sleep(time.Millisecond)
		if err := u.Close(); err != nil {
			t.Error(err)
		}
		for range 8 {
			if err := <-errs; !errors.Is(err, os.ErrClosed) {
				t.Error(err)
			}
		}
	}
}

// TestCloseAllMethods calls everything on a closed FD.
func TestCloseAllMethods(t *testing.T) {
	u := open(t, nil)
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
	for name, call := range map[string]func() error{
		"register":      func() error { _, err := u.Register(1<<20, 4096, RegisterMissing); return err },
		"unregister":    func() error { return u.Unregister(1<<20, 4096) },
		"copy":          func() error { _, err := u.Copy(1<<20, make([]byte, 4096), 0); return err },
		"zeropage":      func() error { _, err := u.Zeropage(1<<20, 4096, 0); return err },
		"continue":      func() error { _, err := u.Continue(1<<20, 4096, 0); return err },
		"poison":        func() error { _, err := u.Poison(1<<20, 4096, 0); return err },
		"move":          func() error { _, err := u.Move(1<<20, 2<<20, 4096, 0); return err },
		"write-protect": func() error { return u.WriteProtect(1<<20, 4096, 0) },
		"wake":          func() error { return u.Wake(1<<20, 4096) },
		"read":          func() error { _, err := u.Read(make([]Msg, 1)); return err },
	} {
		err := call()
		var e *Error
		if !errors.As(err, &e) || e.Op != name || !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := u.Close(); err != nil {
		t.Errorf("a second Close: %v", err)
	}
}

// TestCloseBlocking closes while a Read waits: Close returns, and the Read is the last user.
func TestCloseBlocking(t *testing.T) {
	u := open(t, &OpenOptions{Blocking: true})
	m := anon.memory(t)
	register(t, u, m, RegisterMissing)
	var msg [1]Msg
	read := make(chan error)
	go func() { _, err := u.Read(msg[:]); read <- err }()
	for u.users.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := u.Close(); err != nil {
		t.Error(err)
	}
	c := startPeek(m.at(0), 1)
	if err := <-read; err != nil || msg[0].Address() != m.at(0) {
		t.Errorf("the Read that waited: %v, %v", &msg[0], err)
	}
	if b := c.ok(t); b[0] != 0 { // the last user closed the last copy: a page of zeros
		t.Errorf("read %d", b[0])
	}
	if _, err := unix.FcntlInt(uintptr(u.Fd()), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor after the last user: %v", err)
	}
}

func TestErrorText(t *testing.T) {
	u := open(t, nil)
	_, err := u.Copy(0x10000, make([]byte, 4096), 0)
	if err == nil || !strings.HasPrefix(err.Error(), "copy 0x10000+4096 by userfaultfd: no such file or directory (no mapping") {
		t.Errorf("%v", err)
	}
	m := memfd.memory(t)
	ro, err := os.Open(fdPath(m.file))
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	mem, err := unix.Mmap(int(ro.Fd()), 0, int(m.size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	if _, err = u.Register(address(mem), m.size, RegisterMissing); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("register a read-only file: %v", err)
	}
}
