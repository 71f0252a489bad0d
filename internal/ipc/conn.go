package ipc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is one SOCK_SEQPACKET unix socket in the netpoller. Send may be called from any goroutine, Recv from one at a time (others wait).
type Conn struct {
	uc     *net.UnixConn // immutable
	send   chan struct{} // immutable; one slot: who holds it writes
	rmu    sync.Mutex    // guards rbuf and roob
	rbuf   []byte
	roob   []byte
	closed chan struct{} // closed by Close
	once   sync.Once
	err    error // of the close; written inside once
}

// NewConn takes over a connected "unixpacket" socket. Any other kind is refused, and stays the caller's.
func NewConn(uc *net.UnixConn) (*Conn, error) {
	if n := uc.LocalAddr().Network(); n != "unixpacket" {
		return nil, fmt.Errorf("make connection: socket is %q, want \"unixpacket\" (SOCK_SEQPACKET): %w", n, unix.EPROTOTYPE)
	}
	return &Conn{
		uc:   uc,
		send: make(chan struct{}, 1),
		// One byte more than a frame, so that an oversized one is seen even where MSG_TRUNC would be lost; room for exactly MaxFDs, so that
		// the kernel itself closes the surplus and sets MSG_CTRUNC.
		rbuf:   make([]byte, MaxFrame+1),
		roob:   make([]byte, unix.CmsgSpace(4*MaxFDs)),
		closed: make(chan struct{}),
	}, nil
}

// FileConn makes a connection of an inherited socket. f stays the caller's: its descriptor is duplicated.
func FileConn(f *os.File) (*Conn, error) {
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("make connection from file %s: %w", f.Name(), err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		nc.Close()
		return nil, fmt.Errorf("make connection from file %s: not a unix socket: %w", f.Name(), unix.EPROTOTYPE)
	}
	c, err := NewConn(uc)
	if err != nil {
		uc.Close()
	}
	return c, err
}

// DialConn connects to a listening SOCK_SEQPACKET socket.
func DialConn(ctx context.Context, path string) (*Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return NewConn(nc.(*net.UnixConn))
}

// Pair makes two connected sockets: one in this process, one to hand to a child.
func Pair() (*Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "socketpair"), os.NewFile(uintptr(fds[1]), "socketpair")
	c, err := FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return c, theirs, nil
}

// Send sends one frame with file descriptors. body is the encoded body. It waits while the other end does not read; ctx ends the wait, and then
// nothing was sent. Fails with ErrGone, ErrClosed, or ctx's error.
func (c *Conn) Send(ctx context.Context, h Header, body []byte, fds ...int) error {
	if err := c.hold(ctx); err != nil {
		return fmt.Errorf("send %v: %w", h.Type, err)
	}
	defer c.release()
	return c.sendHeld(ctx, h, body, fds...)
}

// hold makes the caller the one who sends, until release: several frames of its own follow each other then.
func (c *Conn) hold(ctx context.Context) error {
	select {
	case c.send <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-c.closed:
		return ErrClosed
	}
}

func (c *Conn) release() { <-c.send }

// sendHeld is Send for who holds.
func (c *Conn) sendHeld(ctx context.Context, h Header, body []byte, fds ...int) error {
	if len(body) > MaxBody || len(fds) > MaxFDs {
		return fmt.Errorf("send %v: %d bytes and %d file descriptors, limits are %d and %d: %w", h.Type, len(body), len(fds), MaxBody, MaxFDs, ErrMalformed)
	}
	h.Version, h.Length, h.FDs = Version, uint32(len(body)), uint16(len(fds))
	frame := append(h.append(make([]byte, 0, HeaderSize+len(body))), body...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := c.write(ctx, frame, oob); err != nil {
		return fmt.Errorf("send %v: %w", h.Type, err)
	}
	return nil
}

// write sends raw bytes as one packet. The caller holds.
func (c *Conn) write(ctx context.Context, frame, oob []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	// The deadline is this writer's alone: nobody else writes while it holds the slot. A packet goes whole or not at all.
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.uc.SetWriteDeadline(time.Unix(1, 0))
		close(expired)
	})
	_, _, err := c.uc.WriteMsgUnix(frame, oob, nil)
	for try := 0; errors.Is(err, syscall.ETOOMANYREFS) && try < inFlightTries && ctx.Err() == nil; try++ {
		time.Sleep(inFlightPause) // other processes of this user have as many descriptors in sockets as the kernel allows one user: see unix(7)
		_, _, err = c.uc.WriteMsgUnix(frame, oob, nil)
	}
	if !stop() {
		<-expired
		c.uc.SetWriteDeadline(time.Time{})
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return ctx.Err()
		}
	}
	return c.broken(err)
}

// How often, and how soon again, a packet is tried whose descriptors the kernel will not take.
const (
	inFlightTries = 200
	inFlightPause = 5 * time.Millisecond
)

// broken turns what the socket says into ErrGone or ErrClosed, where it is one of them.
func (c *Conn) broken(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, net.ErrClosed):
		return ErrClosed
	case errors.Is(err, io.EOF):
		return ErrGone
	case errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.ENOTCONN), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return err
}

// Recv waits for one frame. With an error that is ErrMalformed or ErrVersion the connection can still be used, and the message is not nil if a
// header could be read: it has no body and no file descriptors then, those that came are closed. Any other error ends the connection.
func (c *Conn) Recv() (*Message, error) {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	n, oobn, flags, _, err := c.uc.ReadMsgUnix(c.rbuf, c.roob) // sets MSG_CMSG_CLOEXEC
	m := &Message{}
	if oobn > 0 {
		fds, perr := parseRights(c.roob[:oobn])
		m.fds = fds
		if perr != nil && err == nil {
			err = perr
		}
	}
	if err != nil {
		m.Close()
		return nil, fmt.Errorf("receive: %w", c.broken(err))
	}
	var h Header
	h, err = ParseHeader(c.rbuf[:n])
	m.Header = h
	switch {
	case flags&unix.MSG_TRUNC != 0 || n > MaxFrame:
		err = fmt.Errorf("%v: longer than a frame may be (%d bytes): %w", h.Type, MaxFrame, ErrMalformed)
	case err != nil:
	case flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("%v: more than %d file descriptors, or no room for them in this process (RLIMIT_NOFILE): %w", h.Type, MaxFDs, ErrMalformed)
	case len(m.fds) != int(h.FDs):
		err = fmt.Errorf("%v: says %d file descriptors, %d came: %w", h.Type, h.FDs, len(m.fds), ErrMalformed)
	}
	if err != nil {
		m.Close()
		m.fds = nil
		if n < HeaderSize {
			m = nil
		}
		return m, fmt.Errorf("receive: %w", err)
	}
	m.Body = append([]byte(nil), c.rbuf[HeaderSize:n]...)
	return m, nil
}

// parseRights collects the file descriptors of all control messages, also where an error is met.
func parseRights(oob []byte) (fds []int, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parse control message: %w", err)
	}
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		got, perr := unix.ParseUnixRights(&msgs[i])
		if perr != nil {
			err = fmt.Errorf("parse rights: %w", perr)
		}
		fds = append(fds, got...)
	}
	return fds, err
}

// Peer tells who was at the other end when the connection was made (SO_PEERCRED, see unix(7)).
func (c *Conn) Peer() (unix.Ucred, error) {
	var cred *unix.Ucred
	rc, err := c.uc.SyscallConn()
	if err == nil {
		cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		if cerr != nil {
			err = cerr
		}
	}
	if err != nil {
		return unix.Ucred{}, fmt.Errorf("read peer credentials: %w", err)
	}
	return *cred, nil
}

// Close ends the connection; whoever waits in Send or Recv returns. Idempotent.
func (c *Conn) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.err = c.uc.Close()
	})
	return c.err
}
