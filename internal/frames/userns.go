package frames

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	helperName    = "machpager-mount" // argv[0] of the helper child
	helperTimeout = 10 * time.Second
	helperSocket  = 3 // a SOCK_SEQPACKET socket in the child
	helperMount   = 4 // "pick": the mount
)

// ErrNoMain is why a mount in a user namespace cannot be had: the program does not call MountMain, so its child would run the program.
var ErrNoMain = errors.New("frames.MountMain was not called (first line of main and of TestMain)")

// mainCalled is set by MountMain.
var mainCalled atomic.Bool

// MountMain serves if this process is the helper that makes a mount in namespaces of its own, and then does not return. It belongs on the first
// line of main and of TestMain. The helper is known by argv[0] and a socket on fd 3, never by an environment variable.
//
// A process of many threads, as every Go program is, cannot enter a new user namespace; a child can be born in one.
func MountMain() {
	if os.Args[0] != helperName || !isSeqpacket(helperSocket) {
		mainCalled.Store(true)
		return
	}
	if err := helperServe(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func isSeqpacket(fd int) bool {
	t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	return err == nil && t == unix.SOCK_SEQPACKET
}

// helperRequest is what the parent sends: one packet of JSON.
type helperRequest struct {
	Op   string // "mount": a new mount and the fd that reconfigures it; "pick": another such fd for the mount on fd 4
	Size int64
	Huge bool
}

// helperReply comes back with the fds.
type helperReply struct {
	Huge, NoSwap bool
	Failed       *helperError
}

// helperError is an error that happened in the helper.
type helperError struct {
	Text  string
	Errno syscall.Errno // 0: none
}

func (e *helperError) Error() string { return e.Text }

func (e *helperError) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// helperServe is the child: one request, one reply.
func helperServe() error {
	b := make([]byte, 4096)
	n, err := unix.Read(helperSocket, b)
	if err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	var q helperRequest
	if err := json.Unmarshal(b[:n], &q); err != nil {
		return fmt.Errorf("decode request: %w", err)
	}
	var r helperReply
	fds, err := q.serve(&r)
	if err != nil {
		r.Failed = &helperError{Text: err.Error()}
		errors.As(err, &r.Failed.Errno)
	}
	b, err = json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode reply: %w", err)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(helperSocket, b, rights, nil, 0); err != nil {
		return fmt.Errorf("send reply: %w", err)
	}
	return nil
}

func (q *helperRequest) serve(r *helperReply) (fds []int, err error) {
	switch q.Op {
	case "mount":
		m, err := mountTmpfs(q.Size, q.Huge, false)
		if err != nil {
			return nil, err
		}
		ctl, err := fspick(m.fd)
		if err != nil {
			return nil, err
		}
		r.Huge, r.NoSwap = m.huge, m.noswap
		return []int{m.fd, ctl}, nil
	case "pick":
		ctl, err := fspick(helperMount)
		if err != nil {
			return nil, err
		}
		return []int{ctl}, nil
	}
	return nil, fmt.Errorf("operation %q: %w", q.Op, unix.EINVAL)
}

// mountInUserNS has a helper child make the mount. This process owns the helper's user namespace, and so has all capabilities over it: that is why
// it may reconfigure the mount later, with a fd of fspick. Only fspick itself needs the child's mount namespace.
func mountInUserNS(size int64, huge bool) (*mount, error) {
	var r helperReply
	fds, err := helperCall(&helperRequest{Op: "mount", Size: size, Huge: huge}, -1, 2, &r)
	if err != nil {
		return nil, err
	}
	return &mount{fd: fds[0], ctl: fds[1], huge: r.Huge, noswap: r.NoSwap, pick: pickInUserNS}, nil
}

// pickInUserNS makes a fd to reconfigure with after one was used up by an error. Any mount namespace that the caller has rights in will do.
func pickInUserNS(mountfd int) (int, error) {
	fds, err := helperCall(&helperRequest{Op: "pick"}, mountfd, 1, &helperReply{})
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// helperCall runs one helper: request, reply with exactly want fds, end. mountfd is lent to the child, -1: none.
func helperCall(q *helperRequest, mountfd, want int, r *helperReply) ([]int, error) {
	if !mainCalled.Load() {
		return nil, ErrNoMain
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket pair: %w", err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "helper socket")
	defer theirs.Close()
	extra := []*os.File{theirs}
	if mountfd >= 0 {
		dup, err := unix.FcntlInt(uintptr(mountfd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("duplicate mount: %w", err)
		}
		f := os.NewFile(uintptr(dup), "mount")
		defer f.Close()
		extra = append(extra, f)
	}
	var stderr bytes.Buffer
	cmd := exec.Cmd{
		Path:       "/proc/self/exe", // also when the file was replaced, or lies where this user cannot go
		Args:       []string{helperName},
		Env:        []string{},
		Dir:        "/",
		Stderr:     &stderr,
		ExtraFiles: extra,
		SysProcAttr: &syscall.SysProcAttr{
			Setsid:      true,
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		},
		WaitDelay: helperTimeout,
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start helper in a user namespace: %w (user namespaces must be allowed: user.max_user_namespaces, seccomp)", err)
	}
	theirs.Close() // so that the child's end is an end of file here
	fds, err := helperExchange(pair[0], q, r)
	cmd.Process.Kill() // the reply was all it was for
	cmd.Wait()
	switch {
	case err != nil:
		err = fmt.Errorf("mount helper: %w %s", err, bytes.TrimSpace(stderr.Bytes()))
	case r.Failed != nil:
		err = fmt.Errorf("mount helper: %w", r.Failed)
	case len(fds) != want:
		err = fmt.Errorf("mount helper: %d fds instead of %d: %w", len(fds), want, unix.EPROTO)
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, err
	}
	return fds, nil
}

func helperExchange(sock int, q *helperRequest, r *helperReply) ([]int, error) {
	tv := unix.NsecToTimeval(helperTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(sock, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return nil, fmt.Errorf("set timeout: %w", err)
	}
	b, err := json.Marshal(q)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	if err := unix.Sendmsg(sock, b, nil, nil, unix.MSG_NOSIGNAL); err != nil {
		return nil, fmt.Errorf("send request: %w", err)
	}
	b, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(8*4))
	var n, nr int
	for {
		n, nr, _, _, err = unix.Recvmsg(sock, b, rights, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("receive reply: %w", err)
	}
	var fds []int
	msgs, err := unix.ParseSocketControlMessage(rights[:nr])
	if err != nil {
		return nil, fmt.Errorf("decode rights: %w", err)
	}
	for i := range msgs {
		got, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return fds, fmt.Errorf("decode rights: %w", err)
		}
		fds = append(fds, got...)
	}
	if n == 0 {
		return fds, fmt.Errorf("receive reply: %w", io.ErrUnexpectedEOF)
	}
	if err := json.Unmarshal(b[:n], r); err != nil {
		return fds, fmt.Errorf("decode reply: %w", err)
	}
	return fds, nil
}
