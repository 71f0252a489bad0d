//go:build linux

package spawn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/internal/frames"
	"machpager/internal/guardian"
)

// ErrRefused says that the system does not permit what the pager needs, or is too old. The pager has said on standard error what it is.
var ErrRefused = errors.New("the pager was refused what it needs (it has said what)")

// ServeOptions of Serve. Socket is needed.
type ServeOptions struct {
	daemon.Config
	Grace time.Duration // how long tasks may take to leave after the first signal; 0: 10 s
	Level slog.Level    // of the pager's log, which goes to standard error as text, or as JSON
	JSON  bool
	Log   *slog.Logger  // the guardian's own; nil: to standard error, as the pager's
	Ready func(pid int) // called whenever a pager serves; nil: nothing
	// Listener is a listening unix socket of the type SOCK_SEQPACKET that somebody else has made (socket activation): tasks connect there, and it stays when Serve
	// ends. Config.Socket says where it is. nil: one is made at Config.Socket.
	Listener *os.File
}

// Serve runs a pager for everybody who may open its socket, with this process as the guardian. On SIGTERM or SIGINT (or when ctx ends) it takes no more
// tasks, waits for those that are there to leave, ends the pager and what still waits for it, and returns nil; a second signal ends the waiting, a third
// the guardian. On SIGHUP, and when an operator asks for it (region.Pager.Upgrade), the pager is replaced by one of the program that this program's
// file contains by then. Main must have been called. When the pager serves, this process gives up the
// capabilities that it does not need any more, unless o.Confine is "never".
func Serve(ctx context.Context, o ServeOptions) error {
	if !mainCalled.Load() {
		return fmt.Errorf("serve: %w", ErrNoMain)
	}
	o.Activated = o.Listener != nil
	h := hello{Version: helloVersion, Role: rolePager, Config: o.Config, JSON: o.JSON, Level: o.Level}
	for _, p := range []*string{&h.Config.Dir, &h.Config.Socket} { // the pager lives elsewhere
		if *p == "" {
			continue
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return fmt.Errorf("serve: %w", err)
		}
		*p = abs
	}
	b, err := h.packet()
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	signals := make(chan os.Signal, 3)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	defer signal.Stop(signals)
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, unix.SIGHUP)
	defer signal.Stop(hangup)
	stop := context.AfterFunc(ctx, func() { signals <- unix.SIGTERM })
	defer stop()
	log := o.Log
	if log == nil {
		var flush func()
		log, flush = newLog(o.JSON, o.Level)
		log = log.With("process", roleGuardian)
		defer flush()
	}
	ready := func(pid int) {
		lessen(o.Config, log)
		if o.Ready != nil {
			o.Ready(pid)
		}
	}
	g := guardian.Options{Command: pagerCommand, SetMountSize: frames.SetMountSize, Hello: b, Restarts: restarts(o.Config), Standby: standby(o.Config), Settled: o.Settled, Stop: signals, Grace: o.Grace, Ready: ready, Listener: o.Listener, Log: log}
	if g.Restarts > 0 {
		path, err := os.Executable()
		if err != nil {
			return fmt.Errorf("serve: find this program's file, for an upgrade: %w", err)
		}
		g.Hangup, g.Upgrade = hangup, func() (func() *exec.Cmd, error) {
			f, err := os.Open(path) // the program as it is now, whatever becomes of its name
			if err != nil {
				return nil, err
			}
			return func() *exec.Cmd { return pagerOf(fmt.Sprintf("/proc/self/fd/%d", f.Fd())) }, nil
		}
	}
	if err := guardian.Run(g); err != nil {
		if ended := (*exec.ExitError)(nil); errors.As(err, &ended) && ended.ExitCode() == daemon.StatusRefused {
			err = fmt.Errorf("%w: %w", ErrRefused, err)
		}
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}
