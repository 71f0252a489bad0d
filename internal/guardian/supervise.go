package guardian

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"machpager/internal/ipc"
)

// ExitState is the exit status of a pager that cannot take over what it was given: another one would not do better.
const ExitState = 3

// delays are how long the guardian waits before it starts a pager again, by the deaths in a row. The last is for all that follow.
var delays = [...]time.Duration{0, 10 * time.Millisecond, 100 * time.Millisecond, time.Second}

// supervisor is the life of one guardian: one pager after another. It has one goroutine.
type supervisor struct {
	Options
	table *table

	served bool             // a pager has been ready
	stops  int              // values of Stop
	grace  <-chan time.Time // ends the grace; nil: not stopping
	killed bool             // the end of the grace, or the second Stop: no other pager follows
}

// run returns when no other pager is to follow, with what the last one ended with.
func (s *supervisor) run() error {
	for deaths := 0; ; {
		began := time.Now()
		err := s.once()
		exit := (*exec.ExitError)(nil)
		switch {
		case err == nil || s.killed && s.stops > 0:
			return nil
		case !s.served || s.Restarts <= 0:
			return err
		case errors.As(err, &exit) && exit.ExitCode() == ExitState:
			s.Log.Error("the new pager cannot take over what the old one left: its tasks end", "err", err)
			return err
		}
		if time.Since(began) >= s.Settled {
			deaths = 0
		}
		if deaths++; deaths > s.Restarts {
			s.Log.Error("the pager keeps dying: its tasks end", "deaths", deaths, "err", err)
			return err
		}
		delay := delays[min(deaths, len(delays))-1]
		s.Log.Warn("the pager has died; starting another on what it left", "err", err, "deaths", deaths, "delay", delay)
		if !s.pause(delay) {
			return nil
		}
	}
}

// pause waits before the next start; false: there is to be none.
func (s *supervisor) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			return true
		case <-s.Stop:
			if s.stopping(); s.killed {
				return false
			}
		case <-s.grace:
			s.killed = true
			return false
		}
	}
}

// stopping notes one value of Stop.
func (s *supervisor) stopping() {
	if s.stops++; s.stops == 1 {
		s.Log.Info("stopping: no new tasks; those that are there may leave", "grace", s.Grace)
		s.grace = time.After(s.Grace)
		return
	}
	s.killed = true
}

// once is the life of one pager: nil if it ended in order.
func (s *supervisor) once() error {
	conn, theirs, err := pair(s.Hello)
	if err != nil {
		return fmt.Errorf("start pager: %w", err)
	}
	ready := make(chan struct{}, 1)
	link := ipc.NewLink(conn, &ipc.LinkOptions{Handler: s.table.handler(ready), Log: s.Log})
	defer link.Close()
	cmd := s.Command()
	cmd.ExtraFiles = []*os.File{theirs}
	if s.Client != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, s.Client)
	}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return fmt.Errorf("start pager: %w", err)
	}
	status, given := make(chan error, 1), make(chan error, 1)
	go func() { status <- cmd.Wait() }()
	go func() { given <- s.table.give(link) }()
	err = s.watch(cmd, link, ready, status, given)
	// What the pager said before it ended is still on the link.
	select {
	case <-link.Done():
	case <-time.After(time.Second):
	}
	link.Close()
	<-given // it ends with the link
	return err
}

// watch returns when the pager has ended, with what it ended with. given is filled again before.
func (s *supervisor) watch(cmd *exec.Cmd, link *ipc.Link, ready <-chan struct{}, status <-chan error, given chan error) error {
	process, all := cmd.Process, given
	for {
		select {
		case err := <-status:
			if all == nil {
				given <- nil
			}
			if err != nil {
				return fmt.Errorf("pager %d ended: %w", process.Pid, err)
			}
			return nil
		case err := <-all:
			all = nil
			if err != nil {
				s.Log.Error("a pager does not take what is held for it: ending it", "pid", process.Pid, "err", err)
				process.Kill()
			}
		case <-ready:
			s.served = true
			if s.Ready != nil {
				s.Ready(process.Pid)
			}
			if s.stops > 0 {
				go stop(link, s.Grace)
			}
		case <-s.Stop:
			if s.stopping(); s.killed {
				process.Kill()
			} else {
				go stop(link, s.Grace)
			}
		case <-s.grace:
			s.Log.Warn("the grace is over: ending the pager")
			s.killed = true
			process.Kill()
		}
	}
}
