//go:build linux

// Package spawn starts a pager as a child of this program: nothing has to be installed, and the program's own memory managers run in it.
//
//	func main() {
//		spawn.Main() // first line: serves, and does not return, if this process is the child
//		pager, err := spawn.Start(ctx, nil)
//
// The pager must be another process, for no code that answers a fault may run in the process that faults: see package region. So Start executes this
// program a second time, as the guardian, which executes it a third time, as the pager. Both are known by their argv[0] and by a socket on fd 3 that
// holds a greeting, never by an environment variable: a program that is merely called so runs as it always does.
//
// The children have a process group of their own, ignore SIGINT, SIGTERM and SIGHUP, and do not get GO* variables (but GORACE, which only the race
// detector reads). They end when this program ends, or calls [region.Pager.Close]: the end of their socket is the sign. The death of a thread of this
// program, or of the goroutine that called Start, is none.
//
// A pager that dies is followed by another, which goes on with all that there is: see Options.Restarts and package region. Objects of the program's own memory managers
// are lost with it, unless the manager says that it remembers: see Manager.
package spawn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/internal/ipc"
	"machpager/region"
)

// ErrNoMain says that Start cannot execute this program as a pager, because it does not call Main.
var ErrNoMain = errors.New("spawn.Main was not called: call it on the first line of main, and of TestMain, or set Options.Executable")

// Manager is a memory manager of the program's own, for objects that name it.
type Manager = daemon.Manager

// Quotas are what one user, by all connections together, and one task, by one connection, may have of the pager.
type Quotas = daemon.Quotas

// Options of Start. nil and zero values mean the defaults.
type Options struct {
	Resident   int64        // bytes of memory all objects together may occupy; 0: half of what is available (cgroup limits included)
	Dir        string       // where paging files go; "": os.TempDir()
	Store      string       // where contents go: "file", "memory", "compressed" memory, or "tiered", compressed memory before a file; "": "tiered"
	Compressed int64        // bytes of memory that compressed contents may take, beside Resident; 0: of "tiered" half of Resident, else no limit
	Capacity   int64        // bytes of paging space; 0: what there is
	Policy     string       // what chooses the pages that go: "refault" or "fifo"; "": "refault"
	Socket     string       // listen here too, so that other processes can Dial it; "": private
	Restarts   int          // how many deaths of the pager in a row, each within 10 s of its start, are answered with a new one that goes on; 0: 5; less: none
	NoStandby  bool         // do not start the next pager beforehand: some MiB less, and a longer pause when the pager dies. See Main
	Quotas     Quotas       // what users and tasks may have; 0 in it: the default
	Confine    string       // whether the pager gives up its privileges: "auto", "always" or "never"; "": "auto". See Main
	Executable string       // a machpager binary to run instead of this program; then Main is not needed
	Log        *slog.Logger // gets the records of the children; nil: discard

	// UserModeOnly works without any privilege, and has the limits that region.DialOptions tells.
	UserModeOnly bool
}

// Start starts a pager and returns when it serves. ctx bounds the start only. The error of a child that dies at its start has its last words. Where the cause
// is an errno or a KernReturn, errors.Is finds it. ErrNoMain if Main was not called.
func Start(ctx context.Context, o *Options) (*region.Pager, error) {
	if o == nil {
		o = &Options{}
	}
	p, err := start(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("start pager: %w", err)
	}
	return p, nil
}

// failPatience is how long the children of a failed start may take to end by themselves.
const failPatience = 2 * time.Second

func start(ctx context.Context, o *Options) (*region.Pager, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h, path, err := o.hello()
	if err != nil {
		return nil, err
	}
	ours, theirs, err := greetedPair(h)
	if err != nil {
		return nil, err
	}
	c, err := startChild(path, theirs, o.Log)
	theirs.Close()
	if err != nil {
		ours.Close()
		return nil, err
	}
	p, err := region.FromConn(ctx, ours, &region.ConnOptions{DialOptions: region.DialOptions{UserModeOnly: o.UserModeOnly}, OnClose: c.waitClosed})
	if err == nil {
		return p, nil
	}
	// The socket is closed: the children end, or are no pager at all. Those that were about to say why are worth a moment.
	dead := time.AfterFunc(failPatience, func() { c.cmd.Process.Kill() })
	select {
	case <-c.exited:
		dead.Stop()
		if refused := (*ipc.RemoteError)(nil); errors.As(err, &refused) {
			return nil, err // it has said why
		}
		return nil, c.explain(err)
	case <-ctx.Done():
		return nil, err
	case <-time.After(failPatience):
		return nil, err
	}
}

// hello is what the guardian is told.
func (o *Options) hello() (hello, string, error) {
	path := o.Executable
	switch {
	case path == "" && !mainCalled.Load():
		return hello{}, "", ErrNoMain
	case path == "":
		path = self
	default:
		var err error
		if path, err = exec.LookPath(path); err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil {
			return hello{}, "", fmt.Errorf("find executable: %w", err)
		}
	}
	h := hello{Version: helloVersion, Role: roleGuardian, JSON: true, Pipe: true, Config: daemon.Config{Restarts: o.Restarts, NoStandby: o.NoStandby,
		Resident: o.Resident, Dir: o.Dir, Store: o.Store, Compressed: o.Compressed, Capacity: o.Capacity, Policy: o.Policy, Socket: o.Socket, Confine: o.Confine, Quotas: o.Quotas}}
	h.Level = levelOf(o.Log)
	if h.Config.Dir == "" {
		h.Config.Dir = os.TempDir()
	}
	var err error
	if h.Config.Dir, err = filepath.Abs(h.Config.Dir); err != nil { // the children live elsewhere
		return hello{}, "", err
	}
	if h.Config.Socket != "" {
		if h.Config.Socket, err = filepath.Abs(h.Config.Socket); err != nil {
			return hello{}, "", err
		}
	}
	return h, path, nil
}

// greetedPair makes the socket to the children, with the greeting in it.
func greetedPair(h hello) (*net.UnixConn, *os.File, error) {
	b, err := h.packet()
	if err != nil {
		return nil, nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "pager"), os.NewFile(uintptr(fds[1]), "task")
	defer ours.Close()
	var c net.Conn
	if _, err = unix.Write(fds[0], b); err == nil {
		c, err = net.FileConn(ours)
	}
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	return c.(*net.UnixConn), theirs, nil
}

// childCommand is a command for one of the roles: no GO* variables but the race detector's, nor the service manager's socket, a process group of its own, no directory held.
//
// The group keeps Ctrl-C and what a shell sends to the program's group away; the role ignores the signals besides. A session would do the same, but the kernel's
// automatic task groups (sched(7), autogroup) schedule each session as one, which costs every switch between the faulting thread and the pager 0.5 to 1 us.
func childCommand(path, role string) *exec.Cmd {
	cmd := exec.Command(path)
	cmd.Args = []string{role}
	cmd.Dir = "/"
	cmd.Env = make([]string, 0, len(os.Environ()))
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if strings.HasPrefix(name, "GO") && name != "GORACE" || name == "NOTIFY_SOCKET" {
			continue
		}
		cmd.Env = append(cmd.Env, v)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// levelOf is the least level that log wants; nil wants nothing.
func levelOf(log *slog.Logger) slog.Level {
	if log == nil {
		return slog.LevelError
	}
	for _, l := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn} {
		if log.Enabled(context.Background(), l) {
			return l
		}
	}
	return slog.LevelError
}
