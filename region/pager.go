//go:build linux

package region

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"machpager/internal/ipc"
)

// DefaultSocket is where a system's pager listens.
const DefaultSocket = "/run/machpager/pager.sock"

// SocketEnv names the environment variable that Dial looks at when it is given no socket.
const SocketEnv = "MACHPAGER_SOCKET"

// patience bounds what Close and the handling of a fault wait for a pager that neither answers nor ends.
const patience = 10 * time.Second

// DialOptions are the options of Dial. nil and zero values mean the defaults.
type DialOptions struct {
	// UserModeOnly works without any privilege: plain touches of missing memory are served, but system calls on it (read(2) into it) fail
	// with EFAULT. ReadAt and WriteAt still work; they keep their P.
	UserModeOnly bool
}

// ConnOptions are the options of FromConn. nil and zero values mean the defaults.
type ConnOptions struct {
	DialOptions
	// OnClose is called once, by Pager.Close, when the connection has ended and nothing of the Pager is in use any more: the place to wait for a
	// pager that is a child of this program. Its error is Close's. nil: nothing.
	OnClose func() error
}

// Pager is a connection to a pager. All methods may be called from any goroutine.
type Pager struct {
	link    *ipc.Link      // immutable
	options ConnOptions    // immutable
	hello   ipc.HelloReply // immutable
	watched chan struct{}  // closed when the connection has ended and, if that was not Close's doing, what is missing is poisoned

	setupMu sync.Mutex
	setup   *setup   // guarded by setupMu; the task's userfaultfd, from the first Map on
	device  *os.File // an open /dev/userfaultfd from the pager, or nil; immutable until Close

	mu      sync.Mutex
	closing bool                 // guarded by mu
	regions map[*Region]struct{} // guarded by mu; from before their faults are served until they are unmapped
	objects map[*Object]struct{} // guarded by mu
	making  sync.WaitGroup       // Add guarded by mu: calls that make Regions and Objects

	once sync.Once
	err  error // written inside once
}

// Dial connects to the pager that listens at socket; "": $MACHPAGER_SOCKET, else DefaultSocket. ctx bounds the dialling only. Errors wrap the errno of
// connect(2) and say what helps.
func Dial(ctx context.Context, socket string, o *DialOptions) (*Pager, error) {
	if socket == "" {
		socket = os.Getenv(SocketEnv)
	}
	if socket == "" {
		socket = DefaultSocket
	}
	var opt ConnOptions
	if o != nil {
		opt.DialOptions = *o
	}
	for tries := 0; ; tries++ {
		conn, err := ipc.DialConn(ctx, socket)
		if err != nil {
			return nil, fmt.Errorf("dial pager: %w%s", err, dialHint(socket, err))
		}
		p, err := newPager(ctx, conn, opt)
		if err == nil {
			return p, nil
		}
		if tries == dialTries || !errors.Is(err, ErrPagerGone) {
			return nil, fmt.Errorf("dial pager at %s: %w", socket, err)
		}
		// A pager that died between the connection and the greeting: the next one listens at the same socket.
	}
}

// dialTries is how often Dial tries again when the pager goes before it has answered.
const dialTries = 3

// FromConn makes a Pager of a connected SOCK_SEQPACKET socket, at whose other end a pager serves: the bridge for region/spawn. It takes uc over,
// and closes it on an error; OnClose is not called then. ctx bounds the greeting only. For a socket that is an *os.File: net.FileConn.
func FromConn(ctx context.Context, uc *net.UnixConn, o *ConnOptions) (*Pager, error) {
	conn, err := ipc.NewConn(uc)
	if err != nil {
		uc.Close()
		return nil, fmt.Errorf("connect to pager: %w", err)
	}
	if o == nil {
		o = &ConnOptions{}
	}
	p, err := newPager(ctx, conn, *o)
	if err != nil {
		return nil, fmt.Errorf("connect to pager: %w", err)
	}
	return p, nil
}

// newPager greets the pager and starts to watch the connection.
func newPager(ctx context.Context, conn *ipc.Conn, o ConnOptions) (*Pager, error) {
	p := &Pager{
		link:    ipc.NewLink(conn, &ipc.LinkOptions{Resend: true}), // a pager that dies is followed by another, which goes on with this connection
		options: o,
		watched: make(chan struct{}),
		regions: map[*Region]struct{}{},
		objects: map[*Object]struct{}{},
	}
	flags := ipc.HelloWantDevice
	if o.UserModeOnly {
		flags = ipc.HelloUserModeOnly
	}
	m, err := p.link.Call(ctx, ipc.TypeHello, ipc.Hello{Features: uint64(taskFeatures), Flags: flags}, nil)
	if err == nil {
		defer m.Close()
		p.hello, _, err = ipc.Decode[ipc.HelloReply](m.Body)
	}
	if err != nil {
		err = p.failed("greet", err)
		p.link.Close()
		return nil, err
	}
	if fd := m.TakeFD(0); fd >= 0 {
		p.device = os.NewFile(uintptr(fd), "/dev/userfaultfd of the pager")
	}
	go p.watch()
	return p, nil
}

// begin registers a call that makes a Region or an Object; end it with p.making.Done.
func (p *Pager) begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closing {
		return ErrClosed
	}
	p.making.Add(1)
	return nil
}

// gone reports whether the pager's end of the connection is gone.
func (p *Pager) gone() bool {
	select {
	case <-p.link.Done():
		return !errors.Is(p.link.Err(), ipc.ErrClosed)
	default:
		return false
	}
}

// Close closes the Regions and Objects of this Pager, then the connection, and calls OnClose. Whoever waits in a call returns with ErrClosed. It waits
// for an ObjectCreate or Map under way, at most as long as their contexts allow. Idempotent; every Close waits for the first and returns the same.
func (p *Pager) Close() error {
	p.once.Do(func() { p.err = p.close() })
	return p.err
}

func (p *Pager) close() error {
	p.mu.Lock()
	p.closing = true // nothing new comes into the maps but what p.making counts
	p.mu.Unlock()
	settled := make(chan struct{})
	go func() {
		p.making.Wait()
		close(settled)
	}()
	select {
	case <-settled:
	case <-time.After(patience): // the pager does not answer: ending the connection ends their calls
		p.link.Hangup()
		<-settled
	}
	p.mu.Lock()
	var regions []*Region
	for r := range p.regions {
		regions = append(regions, r)
	}
	var objects []*Object
	for o := range p.objects {
		objects = append(objects, o)
	}
	p.mu.Unlock()

	var errs []error
	gone := p.gone()
	for _, r := range regions {
		if err := r.Close(); err != nil && !gone {
			errs = append(errs, err)
		}
	}
	for _, o := range objects {
		if err := o.Close(); err != nil && !gone {
			errs = append(errs, err)
		}
	}
	p.link.Close()
	<-p.watched
	p.closeUffd()
	if p.options.OnClose != nil {
		if err := p.options.OnClose(); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("close pager: %w", errors.Join(errs...))
}
