package ipc

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"

	"golang.org/x/sys/unix"
)

// A pager dies and another takes its place; the socket of the task lives on. What the dead one had read is lost with it, what lies on the socket may be
// half of a conversation. So the new one asks for silence (Restarted), throws away all that comes before the answer, and the task sends again what has
// no reply yet. Replies that the dead pager had sent come to the task before Restarted does: what they answer is not sent again.

// announce begins the taking over. From NewLink.
func (l *Link) announce(r Restarted) {
	for l.awaited == 0 {
		// At random, so that the reply to what a predecessor asked, and did not live to read, is not taken for the reply to this.
		l.awaited = rand.Uint32()
	}
	h := Header{Type: TypeRestarted, Seq: l.awaited}
	l.wg.Add(1)
	go func() { // a task that does not read holds nobody up
		defer l.wg.Done()
		b, err := AppendFixed(nil, r)
		if err == nil {
			err = l.conn.Send(l.ctx, h, b)
		}
		if err != nil && !ended(err) {
			l.end(err)
		}
	}()
}

// throwAway takes a frame that came before the answer to Restarted, or that answer. An error ends the connection. A task has a bounded number of frames under
// way, and sends no more before it has read Restarted: who sends more than a multiple of it will never answer.
func (l *Link) throwAway(m *Message, err error) error {
	switch {
	case errors.Is(err, ErrVersion) && m != nil:
		l.lastWords(m.Header, err)
		return err
	case err != nil && !errors.Is(err, ErrMalformed):
		return err
	case err == nil && m.Reply() && m.Type == TypeRestarted && m.Seq == l.awaited:
		defer m.Close()
		rest, err := parseReply(m.Type, m.Body)
		if err != nil {
			return fmt.Errorf("take over connection: %w", err)
		}
		if m.Body = rest; m.check(specs[m.Type].reply) != nil {
			return fmt.Errorf("take over connection: reply to %v: %w", m.Type, ErrMalformed)
		}
		l.awaited = 0
		return nil
	}
	if m != nil {
		m.Close()
	}
	if l.thrown++; l.thrown > 16*l.limit {
		return fmt.Errorf("take over connection: %d frames, and none answers %v: %w", l.thrown, TypeRestarted, ErrMalformed)
	}
	return nil
}

// restart is a Restarted that came.
type restart struct {
	h    Header
	body Restarted
}

// restarted has resume answer a Restarted.
func (l *Link) restarted(m *Message) error {
	defer m.Close()
	r, _, err := Decode[Restarted](m.Body)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	l.restart = &restart{m.Header, r} // an older one that has no answer yet needs none: who asked is dead
	if !l.resuming {
		l.resuming = true
		l.wg.Add(1)
		go l.resume()
	}
	return nil
}

// resume answers Restarted, the last one if there are several, and sends again.
func (l *Link) resume() {
	defer l.wg.Done()
	for {
		l.mu.Lock()
		r := l.restart
		l.restart = nil
		if r == nil || l.err != nil {
			l.resuming = false
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
		if l.onRestart != nil {
			l.onRestart(r.body)
		}
		if err := l.sendAgain(r.h); err != nil {
			if errors.Is(err, ErrGone) {
				err = ErrGone
			}
			l.end(err)
		}
	}
}

// sendAgain answers a Restarted and sends what has no reply yet. It holds the connection meanwhile: a call that was not sent yet goes after
// the answer, once.
func (l *Link) sendAgain(h Header) error {
	if err := l.conn.hold(l.ctx); err != nil {
		return err
	}
	defer l.conn.release()
	b, err := AppendFixed(nil, Status{})
	if err != nil {
		return err
	}
	if err := l.conn.sendHeld(l.ctx, Header{Type: h.Type, Seq: h.Seq, Flags: FlagReply}, b); err != nil {
		return err
	}
	l.mu.Lock()
	again := make([]uint32, 0, len(l.pending))
	for seq, c := range l.pending {
		if c.sent {
			again = append(again, seq)
		}
	}
	base := l.seq
	l.mu.Unlock()
	slices.SortFunc(again, func(a, b uint32) int { return cmp.Compare(a-base-1, b-base-1) }) // oldest first, also where numbers wrapped
	for _, seq := range again {
		if more, err := l.sendOneAgain(seq); !more || err != nil {
			return err
		}
	}
	return nil
}

// sendOneAgain sends a call again, and that nobody waits for it any more, if so. false: the pager that asked is dead too. The caller holds.
func (l *Link) sendOneAgain(seq uint32) (more bool, err error) {
	l.mu.Lock()
	c := l.pending[seq]
	if l.restart != nil || c == nil {
		defer l.mu.Unlock()
		return l.restart == nil, nil
	}
	c.sending = true
	gone, fds := c.gone, c.fds
	l.mu.Unlock()
	err = l.conn.sendHeld(l.ctx, Header{Type: c.typ, Seq: seq, Flags: FlagResend}, c.body, fds...)
	l.mu.Lock()
	if c.sending = false; c.over {
		c.closeFDs()
	}
	l.mu.Unlock()
	if err == nil && gone {
		// Its first Cancel was thrown away. Its effect is wanted no more, but the reply is: it says what there is to undo.
		var b []byte
		if b, err = AppendFixed(nil, Cancel{Seq: seq}); err == nil {
			err = l.conn.sendHeld(l.ctx, Header{Type: TypeCancel, Seq: seq}, b)
		}
	}
	return true, err
}

// closeFDs ends the need for the copies of a call's fds. With Link.mu held.
func (c *call) closeFDs() {
	if c.sending {
		c.over = true
		return
	}
	closeFDs(c.fds)
	c.fds = nil
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// dupFDs makes copies that last longer than the caller's.
func dupFDs(fds []int) ([]int, error) {
	var dup []int
	for _, fd := range fds {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeFDs(dup)
			return nil, fmt.Errorf("copy file descriptor: %w", err)
		}
		dup = append(dup, n)
	}
	return dup, nil
}
