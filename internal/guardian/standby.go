package guardian

import "time"

// standbyDelay is how long the guardian waits before it starts a standby in the place of one that died or could not be started: as long, and twice as long for each one more in
// a row, up to standbyDelayMax. There is no hurry, and what was wrong with the last may be wrong with the next.
const (
	standbyDelay    = time.Second
	standbyDelayMax = time.Minute
)

// standby is what follows the pager there is. The supervisor's goroutine alone uses it.
type standby struct {
	next      *life            // has been started, and given nothing; nil: none
	upgrading bool             // next is of another program, for which the pager was killed: that is no death
	starting  chan prepared    // the standby that is being started; nil: none
	wait      <-chan time.Time // when one is to be started; nil: it is not wanted, or there
	failed    int              // standbys in a row that were of no use
}

// prepared is a pager that stands by, or why there is none.
type prepared struct {
	life *life
	err  error
}

// prepare starts a pager on a goroutine of its own: to find a program, to start it and to ask it may take time, and nobody waits for that.
func prepare(start func() (*life, error)) chan prepared {
	c := make(chan prepared, 1)
	go func() {
		l, err := start()
		c <- prepared{l, err}
	}()
	return c
}

// wantStandby has a standby started after d, unless there is one.
func (s *supervisor) wantStandby(d time.Duration) {
	if s.Standby > 0 && s.Restarts > 0 && s.next == nil && s.starting == nil {
		s.wait = time.After(d)
	}
}

// startStandby starts one, unless one of an upgrade has come first, or nobody will need it.
func (s *supervisor) startStandby() {
	s.wait = nil
	if s.next == nil && s.stops == 0 {
		command := s.Command
		s.starting = prepare(func() (*life, error) { return s.start(command, s.Hello) })
	}
}

// standbyStarted notes that it was started, or why not.
func (s *supervisor) standbyStarted(p prepared) {
	s.starting = nil
	switch {
	case s.next != nil: // of an upgrade, which came first
		p.life.drop()
	case p.err != nil:
		s.standbyDied(p.err)
	default:
		s.next = p.life
	}
}

// standbyDied notes that there is none, and why.
func (s *supervisor) standbyDied(why error) {
	if s.next != nil {
		s.next.link.Close()
		s.next = nil
	}
	delay := min(standbyDelay<<min(s.failed, 16), standbyDelayMax)
	s.failed++
	s.Log.Warn("the pager that stood by is gone; until there is another, a death takes longer", "err", why, "delay", delay)
	s.wantStandby(delay)
}

// takeStandby returns what follows a pager that is dead; nil: another has to be started.
func (s *supervisor) takeStandby() *life {
	if s.starting != nil {
		s.standbyStarted(<-s.starting) // as soon as any other
	}
	l := s.next
	if l == nil {
		return nil
	}
	select {
	case err := <-l.status:
		s.standbyDied(err)
		return nil
	default:
		s.next, s.failed = nil, 0
		return l
	}
}

// dropStandby ends it: no pager follows.
func (s *supervisor) dropStandby() {
	if s.starting != nil {
		s.standbyStarted(<-s.starting)
	}
	s.next.drop()
	s.next = nil
}

// ended is filled when the process has ended; nil for none.
func (l *life) ended() <-chan error {
	if l == nil {
		return nil
	}
	return l.status
}
