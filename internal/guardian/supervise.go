package guardian

import (
	"errors"
	"fmt"
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

	served  bool             // a pager has been ready
	ready   bool             // the one of this life has
	stops   int              // values of Stop
	grace   <-chan time.Time // ends the grace; nil: not stopping
	killed  bool             // the end of the grace, or the second Stop: no other pager follows
	upgrade chan upgrade     // asks for an upgrade
	standby                  // what follows the pager there is
	old     func() *exec.Cmd // makes pagers of the program before the upgrade, until the new one has served; nil: no upgrade is that young
}

// run returns when no other pager is to follow, with what the last one ended with.
func (s *supervisor) run() error {
	defer s.dropStandby()
	for deaths := 0; ; {
		began := time.Now()
		err := s.once()
		exit := (*exec.ExitError)(nil)
		switch {
		case err == nil || s.killed && s.stops > 0:
			return nil
		case s.upgrading:
			s.upgrading, deaths = false, 0
			continue
		case !s.served || s.Restarts <= 0:
			return err
		case s.old != nil:
			s.Log.Error("the new program has died before it served: going back to the old one", "err", err)
			s.Command, s.old = s.old, nil
		case errors.As(err, &exit) && exit.ExitCode() == ExitState:
			s.Log.Error("the new pager cannot take over what the old one left: its tasks end", "err", err)
			return err
		}
		if s.ready && time.Since(began) >= s.Settled {
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
	l := s.takeStandby()
	if l == nil {
		var err error
		if l, err = s.start(s.Command, s.Hello); err != nil {
			return err
		}
	}
	if l.command != nil {
		if s.old == nil {
			s.old = s.Command
		}
		s.Command = l.command
	}
	s.ready = false
	l.current.Store(true)
	given := make(chan error, 1)
	go func() { given <- s.table.give(l.link) }()
	err := s.watch(l, given)
	// What the pager said before it ended is still on the link.
	select {
	case <-l.link.Done():
	case <-time.After(time.Second):
	}
	l.link.Close()
	return err
}

// watch returns when the pager has ended, with what it ended with, and the giving too.
func (s *supervisor) watch(l *life, given <-chan error) error {
	var (
		pid      = l.cmd.Process.Pid
		prepared chan prepared // the pager of an upgrade
		asked    upgrade
		hangup   = s.Hangup
		late     <-chan time.Time // a pager that takes over must come to it
	)
	if s.served {
		t := time.NewTimer(s.TakeOver)
		defer t.Stop()
		late = t.C
	}
	defer func() {
		if given != nil {
			l.link.Hangup()
			<-given
		}
		if prepared != nil { // too late: this one has died before
			go func() { (<-prepared).life.drop() }()
			asked.answer(errors.New("upgrade: the pager has died meanwhile"))
		}
	}()
	s.wait = nil
	for {
		select {
		case err := <-l.status:
			if err != nil {
				return fmt.Errorf("pager %d ended: %w", pid, err)
			}
			return nil
		case err := <-given:
			given = nil
			if err == nil {
				continue
			}
			if !errors.Is(err, ipc.ErrGone) { // else it has died, most likely, and status says so in a moment
				s.Log.Error("a pager does not take what is held for it: ending it", "pid", pid, "err", err)
			}
			l.cmd.Process.Kill()
		case <-late:
			s.Log.Error("a pager that was started on what another one left does not serve: ending it", "pid", pid, "after", s.TakeOver)
			l.cmd.Process.Kill()
		case <-l.ready:
			s.served, s.ready, s.old, late = true, true, nil, nil
			s.wantStandby(s.Standby)
			if s.Ready != nil {
				s.Ready(pid)
			}
			if s.stops > 0 {
				go stop(l.link, s.Grace)
			}
		case <-hangup:
			if prepared == nil && s.stops == 0 {
				asked = upgrade{}
				prepared = prepare(s.successor)
			}
		case u := <-s.upgrade:
			if prepared != nil || s.stops > 0 {
				u.answer(errors.New("upgrade: the pager is being upgraded or stopped already"))
				continue
			}
			asked = u
			prepared = prepare(s.successor)
		case p := <-prepared:
			prepared = nil
			if p.err != nil {
				s.Log.Error("the pager is not upgraded: the old one stays", "err", p.err)
				asked.answer(p.err)
				continue
			}
			s.Log.Info("upgrading: ending the pager, which another one follows", "pid", pid, "next", p.life.cmd.Process.Pid)
			old := s.next
			s.next, s.upgrading = p.life, true
			l.cmd.Process.Kill()
			old.drop() // of the program that is to be no more
		case <-s.wait:
			s.startStandby()
		case p := <-s.starting:
			s.standbyStarted(p)
		case err := <-s.next.ended():
			s.standbyDied(err)
		case <-s.Stop:
			if s.stopping(); s.killed {
				l.cmd.Process.Kill()
			} else {
				go stop(l.link, s.Grace)
			}
		case <-s.grace:
			s.Log.Warn("the grace is over: ending the pager")
			s.killed = true
			l.cmd.Process.Kill()
		}
	}
}
