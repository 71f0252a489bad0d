// Package guardian is the process that starts the pager and outlives it. It holds what must not end with a pager: a copy of every task's userfaultfd with
// the ranges registered on it, of every task's socket, and of every file and piece of memory that a pager's state is in. When the pager dies it starts another, which
// gets all that and goes on. When there is to be no other, the guardian answers the faults that are left: with SIGBUS, never with zeros, never with silence.
//
// It must have nothing to fail: it knows names, a few words and file descriptors, and neither objects nor contents. It touches no memory but its own, waits
// for no lock that somebody holds across a system call on a task's memory, and does nothing at all while the pager lives but note what it is told.
//
// # The link
//
// Pager and guardian talk over a SOCK_SEQPACKET socket (package ipc): the pager's [Client] calls Put and Drop, each acknowledged. The pager
// lets a task touch a mapping only after the guardian has its range, so there is no fault that nobody could answer; and it tells a task of nothing that
// should last before the guardian has it. The guardian gives each new pager all that it holds (Give, then Given), and calls Stop.
//
// # The death of a pager
//
// It is certain when waitpid says so: until then nobody else may touch the state. What the dead pager had sent still counts. Another pager is started at
// once; if it dies soon, after a delay; if too many in a row die soon (Options.Restarts), or the new one says that the state is none it can read
// (ExitState), there is no other. While there is no pager, threads wait in their faults and calls wait for their replies: the new pager wakes and answers them.
//
// # The standby
//
// Most of what a death costs is the start of a process. So the guardian starts the next pager beforehand (Options.Standby): it is greeted, has the link, and waits to be
// given what is held. Until it is, it is asked for nothing and may say nothing: what it says is refused. When the pager dies the standby is given everything, at once.
//
//	it is started     when a pager has served for Options.Standby: not while a pager starts or takes over, and not for one that soon ends
//	it dies           another is started later: standbyDelay. That is no death of a pager. One that is dead when it is needed is as none
//	the pager dies    while there is none: another is started then, as ever. While one is started: that one follows
//	pagers keep dying the delays stay: the standby waits for its turn
//	an upgrade        the standby is ended when the new program has said that it takes over; the next is of the new program, and is started when that serves
//	the guardian ends the standby is ended, or ends by itself at the end of its link
//
// # An upgrade
//
// The guardian starts the new program beside the pager, and asks whether it can take over state of the kind that the pager says it has (ItemState). Only
// then it kills the pager: what follows is the same as after any other death. If that dies, another of the new
// program follows, or of the old one if the new one has never served. The guardian itself stays the program it is.
//
// # The end of a task
//
// It begins for all tasks when there is to be no other pager, and for one task when the pager says that it has left while its memory may
// live on (EndTask). First the sockets are shut down, so that every call fails. Then, for each userfaultfd at the same time: every wait is woken (the dead
// pager may have read the message of any of them), the threads fault again, and each fault is answered by poison on that page (a
// write-protect fault: by taking the protection away, for the bytes are right and nobody evicts any more). Beside that all that is absent is
// poisoned ahead, small ranges first. It goes on until the task's address space is gone or has none of the ranges any more.
//
// Poison refuses where anything is, even a mere write-protect marker on an absent page: so the protection is always taken away first.
//
// # Locks
//
// table.mu and ending.mu, both leaves, never held together. While the items are given to a new pager they do not change: it may put and drop when it has all.
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
	// Command makes the command of a pager, not started yet. Run adds the link as its fd 3 and, if there is one, Client as fd 4.
	Command func() *exec.Cmd
	// Upgrade finds the program that is to follow the one there is, and becomes Command once its pager has followed. nil: no upgrades.
	Upgrade func() (command func() *exec.Cmd, err error)
	// Hangup asks for an upgrade, as the pager itself can (Client.Replace). nil: never.
	Hangup <-chan os.Signal
	// Hello is one packet that lies on the link before the pager starts.
	Hello []byte
	// Client is the socket of the task that started all this: given to every pager, and shut down when the last has gone. Stays the caller's. nil: none.
	Client *os.File
	// Listener is a listening socket that somebody else has made: given to every pager as fd 4, in the place of Client, of which there is none then. Stays the
	// caller's. nil: none.
	Listener *os.File
	// Restarts is how many deaths in a row, each within Settled of its start or before it served, are answered with a new pager. 0: none, the first
	// death is the end.
	Restarts int
	// Settled is how long a pager that served must have lived for its death to be the first in a row again; 0: 10 s.
	Settled time.Duration
	// Standby is how long a pager must have served for another to be started beside it, which takes its place at once when it dies; 0: the next is started when
	// one has died. For Restarts above 0.
	Standby time.Duration
	// TakeOver is how long a pager may take to serve when it follows another one; 0: 60 s. One that takes longer is ended, and counts as dead.
	TakeOver time.Duration
	// Stop ends the pager in order: from the first value on it takes no tasks, and those it has may leave until Grace is over. The second value is the
	// end of the grace, the third the end of the guardian. nil: never.
	Stop <-chan os.Signal
	// Grace is how long tasks may take to leave after Stop; 0: 10 s.
	Grace time.Duration
	// Ready is called whenever a pager serves; nil: nothing.
	Ready func(pid int)
	// SetMountSize sets the size of a tmpfs for a pager that has given up the capability: frames.SetMountSize. nil: such requests are refused.
	SetMountSize func(mountfd, ctlfd int, size int64) error
	// Log hears what an operator should know; nil: nobody.
	Log *slog.Logger
}

// Run starts the pager, holds what it is told to hold, starts another when it dies, and returns when the last has ended and nothing is left that would
// need an answer. It fails if the first pager could not be started, and if the last one ended in any other way than with status 0.
func Run(o Options) error {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Grace == 0 {
		o.Grace = 10 * time.Second
	}
	if o.Settled == 0 {
		o.Settled = 10 * time.Second
	}
	if o.TakeOver == 0 {
		o.TakeOver = time.Minute
	}
	s := &supervisor{Options: o, table: newTable(o.Log), upgrade: make(chan upgrade)}
	s.table.mount.set = o.SetMountSize
	err := s.run()
	if o.Client != nil {
		shutdown(int(o.Client.Fd()))
	}
	s.table.endAll()
	if n := s.table.tasks(); n > 0 {
		o.Log.Warn("the pager is gone; its tasks' faults end with SIGBUS", "tasks", n, "err", err)
	}
	s.table.wait(o.Stop)
	return err
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
