package ipc

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// read is the one reader: it never waits for anything but the next frame.
func (l *Link) read() {
	defer l.wg.Done()
	for {
		m, err := l.conn.Recv()
		switch {
		case l.awaited != 0:
			err = l.throwAway(m, err)
		case err == nil && m.Reply():
			err = l.deliver(m)
		case err == nil:
			err = l.accept(m)
		case m != nil && !m.Reply() && errors.Is(err, ErrMalformed):
			err = l.refuse(m.Header, err) // it has a number: a refusal can find its call
		case m != nil && !m.Reply() && errors.Is(err, ErrVersion):
			l.lastWords(m.Header, err)
		case m == nil && errors.Is(err, ErrMalformed):
			l.lastWords(Header{}, err)
		}
		if err != nil {
			if !errors.Is(err, ErrGone) && !errors.Is(err, ErrClosed) {
				l.log.Warn("connection ended by what the other end sent", "err", err)
			}
			l.end(err)
			return
		}
	}
}

// accept starts the handler of one request, or refuses it. An error ends the connection.
func (l *Link) accept(m *Message) error {
	s, known := specs[m.Type]
	err := error(nil)
	if m.Type == TypeRestarted && l.resend {
		if err = m.check(s.request); err == nil {
			return l.restarted(m)
		}
	} else if !known || l.handler == nil && !s.oneWay {
		err = fmt.Errorf("%v: %w", m.Type, ErrUnknown)
	} else {
		err = m.check(s.request)
	}
	if err != nil {
		m.Close()
		return l.refuse(m.Header, err)
	}
	if m.Type == TypeCancel {
		c, _, err := Decode[Cancel](m.Body)
		if err != nil {
			return err
		}
		l.mu.Lock()
		cancel := l.serving[c.Seq]
		l.mu.Unlock()
		if cancel != nil {
			cancel()
		}
		return nil
	}
	l.mu.Lock()
	_, used := l.serving[m.Seq]
	if used || len(l.serving) >= l.limit || l.err != nil {
		l.mu.Unlock()
		m.Close()
		if used {
			return l.refuse(m.Header, fmt.Errorf("%v: request number %d is in use: %w", m.Type, m.Seq, ErrMalformed))
		}
		return l.refuse(m.Header, fmt.Errorf("%v: %w", m.Type, errFlood))
	}
	ctx, cancel := context.WithCancel(l.ctx)
	l.serving[m.Seq] = cancel
	l.wg.Add(1)
	l.mu.Unlock()
	go l.serve(ctx, cancel, m)
	return nil
}

func (l *Link) serve(ctx context.Context, cancel context.CancelFunc, m *Message) {
	defer l.wg.Done()
	defer cancel()
	defer m.Close()
	if t := specs[m.Type].reply.Tail; t == TailBytes || t == TailList {
		// The one kind of reply that can be large: a peer that asks and does not read must not have them pile up here.
		select {
		case l.large <- struct{}{}:
			defer func() { <-l.large }()
		case <-l.ctx.Done():
		}
	}
	r, err := l.handler(ctx, m)
	m.Body = nil // nor what it asked
	// The number is free before the reply is out, so that whoever gets the reply can use it again at once.
	l.mu.Lock()
	delete(l.serving, m.Seq)
	l.mu.Unlock()
	if r.Done != nil {
		defer r.Done()
	}
	if err != nil {
		l.sendError(l.ctx, m.Header, err)
		return
	}
	body, err := encodeReply(r)
	if err == nil {
		err = specs[m.Type].reply.check(m.Type, body[statusSize:], len(r.FDs))
	}
	if err == nil {
		err = l.conn.Send(l.ctx, Header{Type: m.Type, Seq: m.Seq, Flags: FlagReply}, body, r.FDs...)
	}
	if err != nil && !ended(err) {
		// It does not fit its type, or its fds cannot be sent. Whoever waits for it must not wait for ever.
		l.log.Error("reply cannot be sent", "type", m.Type.String(), "err", err)
		l.sendError(l.ctx, m.Header, err)
	}
}

// ended reports whether a Send failed because the connection ended.
func ended(err error) bool {
	return errors.Is(err, ErrGone) || errors.Is(err, ErrClosed) || errors.Is(err, context.Canceled)
}

func encodeReply(r Reply) ([]byte, error) {
	b, err := AppendFixed(nil, Status{})
	if err != nil {
		return nil, err
	}
	if r.Body != nil {
		if b, err = AppendFixed(b, r.Body); err != nil {
			return nil, err
		}
	}
	return append(b, r.Tail...), nil
}

// refuse sends an error without holding the reader up. A peer that collects more refusals than it may have requests is cut off.
func (l *Link) refuse(h Header, why error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	if l.refusing >= l.limit {
		return fmt.Errorf("the other end does not read its refusals: %w", why)
	}
	l.refusing++
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		l.sendError(l.ctx, h, why)
		l.mu.Lock()
		l.refusing--
		l.mu.Unlock()
	}()
	return nil
}

// lastWords tells the other end why the connection ends. The reader may wait for it a little, for nothing follows.
func (l *Link) lastWords(h Header, why error) {
	ctx, cancel := context.WithTimeout(l.ctx, time.Second)
	defer cancel()
	l.sendError(ctx, h, why)
}

// sendError answers a request with an error. If not even that can be sent, the connection ends: nobody may wait for a reply that never comes.
func (l *Link) sendError(ctx context.Context, h Header, why error) {
	s, text := statusOf(why)
	b, err := AppendFixed(nil, s)
	if err == nil {
		err = l.conn.Send(ctx, Header{Type: h.Type, Seq: h.Seq, Flags: FlagReply}, append(b, text...))
	}
	if err != nil && !ended(err) {
		l.end(err)
	}
}
