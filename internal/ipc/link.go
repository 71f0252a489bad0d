package ipc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"machpager/pager/emm"
)

// Handler serves one request of the other end, on a goroutine of its own. ctx ends with the caller's Cancel and with the connection. The request's type,
// length, and number and kinds of fds have been checked; the request is closed when the handler has returned. An error becomes the
// reply's status. It must not call Close of its own Link (it would wait for itself): Hangup it may.
type Handler func(ctx context.Context, r *Message) (Reply, error)

// Reply is what a Handler answers with. The zero Reply is Empty.
type Reply struct {
	Body any    // the fixed struct; nil: Empty
	Tail []byte // what follows it
	FDs  []int  // stay the handler's until Done
	Done func() // called when the reply was sent or could not be; nil: nothing
}

// LinkOptions are the options of NewLink. nil and zero values mean the defaults.
type LinkOptions struct {
	// Handler serves the other end's calls; nil: all are refused with ErrUnknown.
	Handler Handler
	// InFlight bounds the calls made and the requests served at once, each; 0: DefaultInFlight. A call beyond it waits, a request beyond it
	// is refused with emm.ResourceShortage.
	InFlight int
	// Resend is for the end that outlives the other, a task's: it keeps every call until its reply is here, answers Restarted itself, and sends again what has no
	// reply yet. A call that was refused or whose connection ended is not sent again.
	Resend bool
	// OnRestart is called with each Restarted, on a goroutine of its own, before it is answered; nil: nothing. For an end with Resend.
	OnRestart func(Restarted)
	// Restarted is for a pager that takes over the connection of one that died: it is sent first, and what comes is thrown away until the other end has
	// answered it. nil: the connection is new.
	Restarted *Restarted
	// Log hears what a peer did wrong; nil: nobody.
	Log *slog.Logger
}

// Link is one end of a conversation: it calls, and it serves. All methods may be called from any goroutine.
type Link struct {
	conn    *Conn         // immutable
	handler Handler       // immutable
	limit   int           // immutable
	log     *slog.Logger  // immutable
	slots   chan struct{} // immutable; a call holds one until its reply is here, even if nobody waits for it any more
	large   chan struct{} // immutable; a request whose reply can be large holds one until the reply is sent
	done    chan struct{} // closed when the connection has ended

	resend    bool            // immutable; LinkOptions.Resend
	onRestart func(Restarted) // immutable
	awaited   uint32          // the reader's; the number of the Restarted that has no answer yet, 0: none
	thrown    int             // the reader's; frames that came instead of that answer

	ctx    context.Context // immutable; ends with the connection
	cancel context.CancelFunc

	wg sync.WaitGroup // the reader, handlers, and late replies

	mu       sync.Mutex
	seq      uint32                        // guarded by mu; last one used
	pending  map[uint32]*call              // guarded by mu; nil when the connection has ended
	serving  map[uint32]context.CancelFunc // guarded by mu
	refusing int                           // guarded by mu; goroutines that send refusals
	restart  *restart                      // guarded by mu; the last Restarted, not answered yet; nil: none
	resuming bool                          // guarded by mu; resume runs
	err      error                         // guarded by mu; why the connection ended
}

// call is one request that waits for its reply.
type call struct {
	typ   Type        // immutable
	body  []byte      // immutable; as it is sent again
	reply chan result // one slot: the reader never waits
	late  func(*Message)
	sent  bool // guarded by Conn.hold: it lies on the connection, or somebody has read it

	fds     []int // guarded by Link.mu; copies of what goes with it, to be sent again
	sending bool  // guarded by Link.mu: resume is using fds
	over    bool  // guarded by Link.mu: fds are not needed any more
	gone    bool  // guarded by Link.mu: nobody waits any more
}

type result struct {
	m   *Message
	err error
}

// largeReplies bounds the replies with long tails that wait to be sent.
const largeReplies = 4

// NewLink takes over conn and starts its reader. It ends when the other end closes, when it breaks the protocol beyond repair, and with Close.
func NewLink(conn *Conn, o *LinkOptions) *Link {
	if o == nil {
		o = &LinkOptions{}
	}
	l := &Link{conn: conn, handler: o.Handler, limit: o.InFlight, log: o.Log, done: make(chan struct{}), resend: o.Resend, onRestart: o.OnRestart,
		pending: map[uint32]*call{}, serving: map[uint32]context.CancelFunc{}}
	if l.limit <= 0 {
		l.limit = DefaultInFlight
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	l.slots = make(chan struct{}, l.limit)
	l.large = make(chan struct{}, largeReplies)
	l.ctx, l.cancel = context.WithCancel(context.Background())
	if o.Restarted != nil {
		l.announce(*o.Restarted)
	}
	l.wg.Add(1)
	go l.read()
	return l
}

// Serve serves conn until it ends or ctx does, and returns when every handler has. A peer that closes its end is no error.
func Serve(ctx context.Context, conn *Conn, h Handler, o *LinkOptions) error {
	var opt LinkOptions
	if o != nil {
		opt = *o
	}
	opt.Handler = h
	l := NewLink(conn, &opt)
	stop := context.AfterFunc(ctx, l.Hangup)
	defer stop()
	<-l.Done()
	l.Close()
	if err := l.Err(); !errors.Is(err, ErrGone) && !errors.Is(err, ErrClosed) {
		return err
	}
	return nil
}

// Done is closed when the connection has ended.
func (l *Link) Done() <-chan struct{} { return l.done }

// Err says why the connection ended; nil while it lives. It wraps ErrGone, ErrClosed, or ErrMalformed.
func (l *Link) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Conn is the connection below, for its Peer.
func (l *Link) Conn() *Conn { return l.conn }

// Hangup ends the connection without waiting for anybody. Idempotent.
func (l *Link) Hangup() { l.end(ErrClosed) }

// Close ends the connection, fails every call in flight with ErrClosed, and waits for the reader and the handlers. Idempotent.
func (l *Link) Close() error {
	l.Hangup()
	l.wg.Wait()
	return nil
}

// end is where a connection ends, whoever begins it. The first reason stays.
func (l *Link) end(why error) {
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return
	}
	l.err = why
	pending := l.pending
	l.pending = nil
	for _, c := range pending {
		c.closeFDs()
	}
	l.mu.Unlock()
	l.conn.Close()
	l.cancel()
	close(l.done) // first: who gets one of these errors can see that it is the end
	for _, c := range pending {
		c.reply <- result{err: why}
		<-l.slots
	}
}

// CallOptions are the optional parts of a call. nil and zero values mean none.
type CallOptions struct {
	Tail []byte // follows the fixed body
	FDs  []int  // sent along; kept open by the caller until Call returns
	// Late gets the reply of a call that succeeded after its caller had gone (ctx ended), on a goroutine of its own, so that it can undo what was
	// done for nobody. The message is closed after it.
	Late func(*Message)
}

// Call sends a request and waits for its reply, whose Body is then the reply's own, status taken off; the caller closes it. ctx ends the
// wait: a Cancel is sent and ctx's error returned. When a call fails because the connection ended, Done is closed already. See the
// package comment for errors.
func (l *Link) Call(ctx context.Context, t Type, body any, o *CallOptions) (*Message, error) {
	if o == nil {
		o = &CallOptions{}
	}
	if body == nil {
		body = Empty{}
	}
	b, err := AppendFixed(nil, body)
	if err != nil {
		return nil, fmt.Errorf("call %v: %w", t, err)
	}
	b = append(b, o.Tail...)
	select {
	case l.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("call %v: %w", t, ctx.Err())
	case <-l.done:
		return nil, fmt.Errorf("call %v: %w", t, l.Err())
	}
	c := &call{typ: t, body: b, reply: make(chan result, 1), late: o.Late}
	if l.resend {
		if c.fds, err = dupFDs(o.FDs); err != nil {
			<-l.slots
			return nil, fmt.Errorf("call %v: %w", t, err)
		}
	}
	seq, err := l.register(c)
	if err != nil {
		closeFDs(c.fds)
		<-l.slots
		<-l.done
		return nil, fmt.Errorf("call %v: %w", t, err)
	}
	if err := l.sendFirst(ctx, c, seq, o.FDs); err != nil {
		l.forget(seq)
		if errors.Is(err, ErrGone) || errors.Is(err, ErrClosed) {
			l.end(ErrGone)
			<-l.done // somebody else may have begun the end
			err = l.Err()
		}
		return nil, fmt.Errorf("call %v: %w", t, err)
	}
	select {
	case r := <-c.reply:
		return l.take(c, r)
	case <-ctx.Done():
	}
	l.mu.Lock()
	c.gone = true
	l.mu.Unlock()
	select {
	case r := <-c.reply: // it came before gone was set: it is ours
		return l.take(c, r)
	default:
	}
	l.sendCancel(seq)
	return nil, fmt.Errorf("call %v: %w", t, ctx.Err())
}

func (l *Link) take(c *call, r result) (*Message, error) {
	if r.err != nil {
		return nil, fmt.Errorf("call %v: %w", c.typ, r.err)
	}
	return r.m, nil
}

// register gives a call its number.
func (l *Link) register(c *call) (uint32, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return 0, l.err
	}
	for { // a call whose reply never came may still hold its number when they wrap
		l.seq++
		if _, used := l.pending[l.seq]; !used && l.seq != 0 {
			break
		}
	}
	l.pending[l.seq] = c
	return l.seq, nil
}

// sendFirst sends a call for the first time.
func (l *Link) sendFirst(ctx context.Context, c *call, seq uint32, fds []int) error {
	if err := l.conn.hold(ctx); err != nil {
		return fmt.Errorf("send %v: %w", c.typ, err)
	}
	defer l.conn.release()
	err := l.conn.sendHeld(ctx, Header{Type: c.typ, Seq: seq}, c.body, fds...)
	c.sent = err == nil
	return err
}

// forget drops a call that was not sent.
func (l *Link) forget(seq uint32) {
	l.mu.Lock()
	c, ok := l.pending[seq]
	delete(l.pending, seq)
	if ok {
		c.closeFDs()
	}
	l.mu.Unlock()
	if ok {
		<-l.slots
	}
}

// sendCancel tells the other end that nobody waits. It must not hold up who goes, so it is sent aside.
func (l *Link) sendCancel(seq uint32) {
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return
	}
	l.wg.Add(1)
	l.mu.Unlock()
	go func() {
		defer l.wg.Done()
		b, _ := AppendFixed(nil, Cancel{Seq: seq})
		l.conn.Send(l.ctx, Header{Type: TypeCancel, Seq: seq}, b)
	}()
}

// deliver gives a reply to its call.
func (l *Link) deliver(m *Message) error {
	l.mu.Lock()
	c, ok := l.pending[m.Seq]
	if !ok || c.typ != m.Type {
		l.mu.Unlock()
		m.Close()
		if m.Seq == 0 { // last words: what was sent from here had no readable header
			if _, err := parseReply(m.Type, m.Body); err != nil {
				return err
			}
		}
		return fmt.Errorf("reply to %v %d, which was not asked: %w", m.Type, m.Seq, ErrMalformed)
	}
	delete(l.pending, m.Seq)
	c.closeFDs()
	rest, err := parseReply(m.Type, m.Body)
	if err == nil {
		m.Body = rest
		err = m.check(specs[m.Type].reply)
	}
	late := c.gone
	if !late {
		if err != nil {
			m.Close()
			m = nil
		}
		c.reply <- result{m, err}
	} else if err == nil && c.late != nil {
		l.wg.Add(1)
	}
	l.mu.Unlock()
	<-l.slots
	switch {
	case !late:
	case err == nil && c.late != nil:
		go func() {
			defer l.wg.Done()
			defer m.Close()
			c.late(m)
		}()
	default:
		m.Close()
	}
	return nil
}

// errFlood refuses what is beyond the bound.
var errFlood = fmt.Errorf("too many requests in flight (wait for replies): %w", emm.ResourceShortage)
