// Package guardian is the process that starts the pager and outlives it. It holds a copy of every task's userfaultfd with the ranges registered
// on it, and of every task's socket. When the pager is gone, however it went, the guardian answers the faults that are left: with SIGBUS,
// never with zeros, never with silence.
//
// It must have nothing to fail: it knows names and file descriptors, and neither objects nor contents. It touches no memory but its own, waits
// for no lock that somebody holds across a system call on a task's memory, and does nothing at all while the pager lives but note what it is told.
//
// # The link
//
// Pager and guardian talk over a SOCK_SEQPACKET socket (package ipc): the pager's [Client] calls Put and Drop, each acknowledged. The pager
// lets a task touch a mapping only after the guardian has its range, so there is no fault that nobody could answer. The guardian
// calls Stop.
//
// # The end of a task
//
// It begins for all tasks when waitpid says that the pager is gone, and for one task when the pager says that it has left while its memory may
// live on (EndTask). First the sockets are shut down, so that every call fails. Then, for each userfaultfd at the same time: every wait is woken (the dead
// pager may have read the message of any of them), the threads fault again, and each fault is answered by poison on that page (a
// write-protect fault: by taking the protection away, for the bytes are right and nobody evicts any more). Beside that all that is absent is
// poisoned ahead, small ranges first. It goes on until the task's address space is gone or has none of the ranges any more.
//
// Poison refuses where anything is, even a mere write-protect marker on an absent page: so the protection is always taken away first.
//
// # Locks
//
// table.mu and ending.mu, both leaves, never held together.
package guardian

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
)

// Options for Run. Command is needed.
type Options struct {
	// Command is the pager, not started yet. Run adds the link as its fd 3 and, if there is one, Client as fd 4.
	Command *exec.Cmd
	// Hello is one packet that lies on the link before the pager starts.
	Hello []byte
	// Client is the socket of the task that started all this: given to the pager, and shut down when the pager has gone. Stays the caller's. nil: none.
	Client *os.File
	// Stop ends the pager in order: from the first value on it takes no tasks, and those it has may leave until Grace is over. The second value is the
	// end of the grace, the third the end of the guardian. nil: never.
	Stop <-chan os.Signal
	// Grace is how long tasks may take to leave after Stop; 0: 10 s.
	Grace time.Duration
	// Ready is called once when the pager serves; nil: nothing.
	Ready func(pid int)
	// Log hears what an operator should know; nil: nobody.
	Log *slog.Logger
}

// Run starts the pager, holds what it is told to hold, and returns when the pager has ended and nothing is left that would need an answer. It
// fails if the pager could not be started, or ended in any other way than with status 0.
func Run(o Options) error {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Grace == 0 {
		o.Grace = 10 * time.Second
	}
	t := newTable(o.Log)
	conn, theirs, err := pair(o.Hello)
	if err != nil {
		return fmt.Errorf("start pager: %w", err)
	}
	ready := make(chan struct{}, 1)
	link := ipc.NewLink(conn, &ipc.LinkOptions{Handler: t.handler(ready), Log: o.Log})
	defer link.Close()
	o.Command.ExtraFiles = []*os.File{theirs}
	if o.Client != nil {
		o.Command.ExtraFiles = append(o.Command.ExtraFiles, o.Client)
	}
	err = o.Command.Start()
	theirs.Close()
	if err != nil {
		return fmt.Errorf("start pager: %w", err)
	}
	status := make(chan error, 1)
	go func() { status <- o.Command.Wait() }()

	err = supervise(o, link, ready, status)
	if o.Client != nil {
		shutdown(int(o.Client.Fd()))
	}
	// What the pager said before it ended is still on the link.
	select {
	case <-link.Done():
	case <-time.After(time.Second):
	}
	link.Close()
	t.endAll()
	if n := t.len(); n > 0 {
		o.Log.Warn("the pager is gone; its tasks' faults end with SIGBUS", "tasks", n, "err", err)
	}
	t.wait(o.Stop)
	return err
}

// supervise returns when the pager has ended, with what it ended with.
func supervise(o Options, link *ipc.Link, ready <-chan struct{}, status <-chan error) error {
	var (
		stops   int
		grace   <-chan time.Time
		killed  bool
		process = o.Command.Process
	)
	for {
		select {
		case err := <-status:
			if err != nil && !(killed && stops > 0) {
				return fmt.Errorf("pager %d ended: %w", process.Pid, err)
			}
			return nil
		case <-ready:
			if o.Ready != nil {
				o.Ready(process.Pid)
			}
		case <-o.Stop:
			if stops++; stops == 1 {
				o.Log.Info("stopping: no new tasks; those that are there may leave", "grace", o.Grace)
				grace = time.After(o.Grace)
				go stop(link, o.Grace)
				continue
			}
			killed = true
			process.Kill()
		case <-grace:
			o.Log.Warn("the grace is over: ending the pager")
			killed = true
			process.Kill()
		}
	}
}

// stop asks the pager to end. That it does not answer is the grace's business.
func stop(link *ipc.Link, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if m, err := link.Call(ctx, ipc.TypeStop, nil, nil); err == nil {
		m.Close()
	}
}

// pair makes the link. hello is in it before anybody reads.
func pair(hello []byte) (*ipc.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make link: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "link"), os.NewFile(uintptr(fds[1]), "link")
	defer ours.Close()
	if len(hello) > 0 {
		_, err = unix.Write(fds[0], hello)
	}
	var c *ipc.Conn
	if err == nil {
		c, err = ipc.FileConn(ours)
	}
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("make link: %w", err)
	}
	return c, theirs, nil
}

// shutdown ends a connection for everybody who holds a copy of the socket. shutdown(2). That it had ended before is as good.
func shutdown(fd int) { unix.Shutdown(fd, unix.SHUT_RDWR) }
