//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	sd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"machpager/region"
	"machpager/region/spawn"
)

// manager is the service manager that has started serve, if one has: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).
type manager struct {
	notify   string        // the address of its socket; "": none
	watchdog time.Duration // how long it waits for a word; 0: for ever
	pager    atomic.Int64  // pid of the pager that serves; 0: none yet
}

// newManager finds it out, and takes what it passes on. Nothing of it is left in the environment of the pager.
func newManager(given func(flag string) bool, o *spawn.ServeOptions) (*manager, error) {
	m := &manager{notify: os.Getenv("NOTIFY_SOCKET")}
	var err error
	if m.watchdog, err = sd.SdWatchdogEnabled(true); err != nil {
		return nil, usageError{fmt.Errorf("WATCHDOG_USEC: %w", err)}
	}
	files := activation.Files(true)
	switch {
	case len(files) == 0:
		return m, nil
	case len(files) > 1:
		return nil, usageError{fmt.Errorf("%d sockets were passed on: want one (ListenSequentialPacket= in the socket unit)", len(files))}
	case given("group"):
		return nil, usageError{errors.New("--group: the socket was passed on: say SocketGroup= and SocketMode= in its unit")}
	}
	path, err := listening(files[0])
	if err != nil {
		return nil, usageError{fmt.Errorf("the socket that was passed on: %w", err)}
	}
	if given("socket") && o.Socket != path {
		return nil, usageError{fmt.Errorf("--socket %s: the socket that was passed on is %s", o.Socket, path)}
	}
	o.Socket, o.Listener = path, files[0]
	return m, nil
}

// listening is the path of a listening unix socket of the type that tasks connect to.
func listening(f *os.File) (path string, err error) {
	fd := int(f.Fd())
	for _, x := range []struct {
		option, want int
		problem      string
	}{
		{unix.SO_DOMAIN, unix.AF_UNIX, "it is no unix socket"},
		{unix.SO_TYPE, unix.SOCK_SEQPACKET, "it is not of the type SOCK_SEQPACKET (ListenSequentialPacket=)"},
		{unix.SO_ACCEPTCONN, 1, "it does not listen (Accept=no)"},
	} {
		if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, x.option); err != nil {
			return "", fmt.Errorf("it is no socket: %w", err)
		} else if got != x.want {
			return "", errors.New(x.problem)
		}
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return "", err
	}
	un, ok := name.(*unix.SockaddrUnix)
	if !ok || !strings.HasPrefix(un.Name, "/") {
		return "", errors.New("it has no path")
	}
	return un.Name, nil
}

// tell says something to the service manager, if there is one.
func (m *manager) tell(state string) {
	if m.notify == "" {
		return
	}
	if _, err := sd.SdNotify(false, state); err != nil {
		fmt.Fprintln(os.Stderr, "machpager: tell the service manager:", err)
	}
}

// ready says that a pager serves.
func (m *manager) ready(pid int) {
	m.pager.Store(int64(pid))
	m.tell(fmt.Sprintf("%s\nSTATUS=the pager is process %d", sd.SdNotifyReady, pid))
}

// watch says when serve begins to end, and as long as the pager answers at its socket, if the service manager wants to hear that. A pager that is given as long as the
// service manager would wait, and does not answer, is ended: the guardian knows what to do then. So it is only the guardian that the service manager need
// watch. stop ends it.
func (m *manager) watch(ending context.Context, socket string) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ends := context.AfterFunc(ending, func() { m.tell(sd.SdNotifyStopping) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		if m.watchdog == 0 {
			return
		}
		m.keepAlive(ctx, ending, socket)
	}()
	return func() {
		ends()
		cancel()
		<-done
	}
}

// keepAlive looks after the pager three times in the time that the service manager waits.
func (m *manager) keepAlive(ctx, ending context.Context, socket string) {
	tick := time.NewTicker(m.watchdog / 3)
	defer tick.Stop()
	var since time.Time // when the pager began not to answer
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		m.tell(sd.SdNotifyWatchdog) // the guardian is well
		pid := m.pager.Load()
		if pid == 0 || ending.Err() != nil { // nobody is to answer yet, or any more
			continue
		}
		switch begun := time.Now(); {
		case answers(ctx, socket, m.watchdog/4):
			since = time.Time{}
		case since.IsZero():
			since = begun
		case time.Since(since) > m.watchdog && m.pager.Load() == pid && ctx.Err() == nil:
			fmt.Fprintf(os.Stderr, "machpager: the pager (process %d) has not answered for %v: ending it\n", pid, time.Since(since).Round(time.Millisecond))
			unix.Kill(int(pid), unix.SIGKILL) // a child of this process, not waited for before it is dead
			since = time.Time{}
		}
	}
}

// answers reports whether somebody answers at the socket within limit, if only by a refusal.
func answers(ctx context.Context, socket string, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	p, err := region.Dial(ctx, socket, nil)
	if err == nil {
		p.Close()
	}
	return !errors.Is(err, context.DeadlineExceeded)
}
