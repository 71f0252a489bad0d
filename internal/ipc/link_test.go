package ipc

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
)

// links makes a client and a server that answers by h.
func links(t *testing.T, h Handler, o *LinkOptions) (client, server *Link) {
	t.Helper()
	noNewFDs(t)
	a, b := pair(t)
	if o == nil {
		o = &LinkOptions{}
	}
	so := *o
	so.Handler = h
	client, server = NewLink(a, &LinkOptions{InFlight: o.InFlight}), NewLink(b, &so)
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// echo answers ObjectOpen with a handle made of the port, and ObjectClose after a while.
func echo(_ context.Context, r *Message) (Reply, error) {
	q, _, err := Decode[ObjectOpen](r.Body)
	return Reply{Body: ObjectReply{Handle: uint64(q.Port[0]) + uint64(q.Port[1])<<8, Port: q.Port}}, err
}

func TestCalls(t *testing.T) {
	client, _ := links(t, func(ctx context.Context, r *Message) (Reply, error) {
		time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
		return echo(ctx, r)
	}, nil)
	var wg sync.WaitGroup
	for g := range 300 { // more than may be in flight
		wg.Go(func() {
			for i := range 10 {
				var q ObjectOpen
				q.Port[0], q.Port[1], q.Port[2] = byte(g), byte(g>>8), byte(i)
				m, err := client.Call(t.Context(), TypeObjectOpen, q, nil)
				if err != nil {
					t.Error(err)
					return
				}
				r, _, err := Decode[ObjectReply](m.Body)
				m.Close()
				if err != nil || r.Port != q.Port || r.Handle != uint64(g) {
					t.Errorf("call %d.%d got %+v, %v", g, i, r, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestBothWays(t *testing.T) {
	noNewFDs(t)
	a, b := pair(t)
	l := [2]*Link{NewLink(a, &LinkOptions{Handler: echo}), NewLink(b, &LinkOptions{Handler: echo})}
	defer l[0].Close()
	defer l[1].Close()
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			if _, err := l[i%2].Call(t.Context(), TypeObjectOpen, ObjectOpen{}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestErrorsCross(t *testing.T) {
	var answer atomic.Value // the race detector does not follow a socket
	client, _ := links(t, func(context.Context, *Message) (Reply, error) { return Reply{}, answer.Load().(func() error)() }, nil)
	for _, c := range []struct {
		err  error
		want []error
		not  []error
	}{
		{fmt.Errorf("create: %w", emm.NoSpace), []error{emm.NoSpace}, []error{emm.Failure, unix.EPERM}},
		{fmt.Errorf("open: %w (run as root)", unix.EPERM), []error{unix.EPERM}, []error{emm.Failure}},
		{fmt.Errorf("read: %w: %w", emm.MemoryError, unix.EIO), []error{emm.MemoryError, unix.EIO}, nil},
		{errors.New("anything"), []error{emm.Failure}, []error{unix.EPERM}},
		{context.Canceled, []error{context.Canceled}, []error{emm.Failure}},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), []error{context.DeadlineExceeded}, nil},
		{fmt.Errorf("x: %w", ErrMalformed), []error{ErrMalformed}, nil},
	} {
		answer.Store(func() error { return c.err })
		_, err := client.Call(t.Context(), TypeInfo, nil, nil)
		var remote *RemoteError
		if !errors.As(err, &remote) || remote.Error() != c.err.Error() {
			t.Fatalf("%v came as %v", c.err, err)
		}
		for _, want := range c.want {
			if !errors.Is(err, want) {
				t.Errorf("%v came as %v, which is not %v", c.err, err, want)
			}
		}
		for _, not := range c.not {
			if errors.Is(err, not) {
				t.Errorf("%v came as %v, which is %v", c.err, err, not)
			}
		}
	}
}

func TestFDsCross(t *testing.T) {
	f := temp(t)
	want := make(chan uint64, 2)
	inode := func(fd int) uint64 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Error(err)
		}
		return st.Ino
	}
	var sent atomic.Int32
	client, _ := links(t, func(_ context.Context, r *Message) (Reply, error) {
		if r.Type == TypeMap {
			return Reply{Body: MapReply{Mapping: 1}, FDs: []int{int(f.Fd())}, Done: func() { sent.Add(1) }}, nil
		}
		want <- inode(r.FD(0))
		return Reply{Body: ObjectReply{}}, nil
	}, nil)
	tail, err := AppendStrings(nil, "", "")
	if err != nil {
		t.Fatal(err)
	}
	m, err := client.Call(t.Context(), TypeObjectCreate, ObjectCreate{Size: 1}, &CallOptions{Tail: tail, FDs: []int{int(f.Fd())}})
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	if got := <-want; got != inode(int(f.Fd())) {
		t.Fatalf("inode %d came", got)
	}
	m, err = client.Call(t.Context(), TypeMap, Map{}, nil)
	if err != nil || inode(m.FD(0)) != inode(int(f.Fd())) {
		t.Fatalf("reply: %v", err)
	}
	m.Close()
	for deadline := time.Now().Add(5 * time.Second); sent.Load() != 1; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("Done was not called")
		}
	}
}

func TestServerRefuses(t *testing.T) {
	f := temp(t)
	client, _ := links(t, func(context.Context, *Message) (Reply, error) {
		t.Error("the handler was called")
		return Reply{}, nil
	}, nil)
	for _, c := range []struct {
		name string
		typ  Type
		body any
		o    CallOptions
		want error
	}{
		{"unknown type", 4711, Empty{}, CallOptions{}, ErrUnknown},
		{"short body", TypeMap, uint32(1), CallOptions{}, ErrMalformed},
		{"long body", TypeMap, Map{}, CallOptions{Tail: []byte{0}}, ErrMalformed},
		{"fd where none is due", TypeInfo, Empty{}, CallOptions{FDs: []int{int(f.Fd())}}, ErrMalformed},
		{"no fd where one is due", TypeTaskUffd, TaskUffd{}, CallOptions{}, ErrMalformed},
		{"two fds where one is due", TypeTaskUffd, TaskUffd{}, CallOptions{FDs: []int{int(f.Fd()), int(f.Fd())}}, ErrMalformed},
		{"fd of the wrong kind", TypeTaskUffd, TaskUffd{}, CallOptions{FDs: []int{int(f.Fd())}}, ErrMalformed},
	} {
		if _, err := client.Call(t.Context(), c.typ, c.body, &c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestGarbageIsAnsweredAndEndsOnlyItself(t *testing.T) {
	a, fd := rawPair(t)
	l := NewLink(a, &LinkOptions{Handler: echo})
	defer l.Close()
	answer := func() (Header, error) {
		b := make([]byte, MaxFrame)
		n, err := unix.Read(fd, b)
		if err != nil {
			t.Fatal(err)
		}
		h, err := ParseHeader(b[:n])
		if err != nil || !h.Reply() {
			t.Fatalf("%+v, %v", h, err)
		}
		_, err = parseReply(h.Type, b[HeaderSize:n])
		return h, err
	}
	raw(t, fd, frame(Header{Version: Version, Type: TypeMap, Seq: 5, Length: 77}, nil))
	if h, err := answer(); h.Seq != 5 || h.Type != TypeMap || !errors.Is(err, ErrMalformed) {
		t.Fatalf("wrong length: %+v, %v", h, err)
	}
	body, err := AppendFixed(nil, ObjectOpen{})
	if err != nil {
		t.Fatal(err)
	}
	raw(t, fd, frame(Header{Version: Version, Type: TypeObjectOpen, Seq: 6, Length: uint32(len(body))}, body))
	if h, err := answer(); h.Seq != 6 || err != nil {
		t.Fatalf("a good one after it: %+v, %v", h, err)
	}
	raw(t, fd, []byte("garbage"))
	if h, err := answer(); h.Seq != 0 || !errors.Is(err, ErrMalformed) {
		t.Fatalf("garbage: %+v, %v", h, err)
	}
	<-l.Done()
	if err := l.Err(); !errors.Is(err, ErrMalformed) {
		t.Fatal(err)
	}
}

func TestVersionMismatch(t *testing.T) {
	a, fd := rawPair(t)
	l := NewLink(a, &LinkOptions{Handler: echo})
	defer l.Close()
	raw(t, fd, frame(Header{Version: 9, Type: TypeHello, Seq: 1, Length: 3}, []byte("new")))
	b := make([]byte, MaxFrame)
	n, err := unix.Read(fd, b)
	if err != nil {
		t.Fatal(err)
	}
	h, err := ParseHeader(b[:n])
	if err != nil || h.Seq != 1 {
		t.Fatalf("%+v, %v", h, err)
	}
	if _, err := parseReply(h.Type, b[HeaderSize:n]); !errors.Is(err, ErrVersion) {
		t.Fatal(err)
	}
	<-l.Done()

	// And from the caller's side: its call fails with the version, whatever the reply contains.
	a, fd = rawPair(t)
	l = NewLink(a, nil)
	defer l.Close()
	go func() {
		b := make([]byte, MaxFrame)
		if n, err := unix.Read(fd, b); err == nil && n > 0 {
			unix.Write(fd, frame(Header{Version: 9, Type: TypeHello, Seq: 1, Flags: FlagReply}, nil))
		}
	}()
	if _, err := l.Call(t.Context(), TypeHello, Hello{}, nil); !errors.Is(err, ErrVersion) {
		t.Fatal(err)
	}
}

func TestCancel(t *testing.T) {
	cancelled, started := make(chan struct{}), make(chan struct{})
	client, _ := links(t, func(ctx context.Context, r *Message) (Reply, error) {
		if r.Type == TypePopulate {
			close(started)
			<-ctx.Done()
			close(cancelled)
			return Reply{}, ctx.Err()
		}
		return echo(ctx, r)
	}, nil)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-started
		cancel()
	}()
	if _, err := client.Call(ctx, TypePopulate, Populate{}, nil); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	select {
	case <-cancelled:
	case <-time.After(10 * time.Second):
		t.Fatal("the handler was not cancelled")
	}
	if _, err := client.Call(ctx, TypePopulate, Populate{}, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled before: %v", err)
	}
	if m, err := client.Call(t.Context(), TypeObjectOpen, ObjectOpen{}, nil); err != nil {
		t.Fatal(err)
	} else {
		m.Close()
	}
}

// A reply that comes after its caller has gone is given to Late, and its fds are closed.
func TestLateReply(t *testing.T) {
	f := temp(t)
	release := make(chan struct{})
	client, _ := links(t, func(context.Context, *Message) (Reply, error) {
		<-release // deaf to Cancel
		return Reply{Body: MapReply{Mapping: 42}, FDs: []int{int(f.Fd())}}, nil
	}, nil)
	late := make(chan uint64, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := client.Call(ctx, TypeMap, Map{}, &CallOptions{Late: func(m *Message) {
		if m.FD(0) < 0 {
			t.Error("no fd")
		}
		r, _, err := Decode[MapReply](m.Body)
		if err != nil {
			t.Error(err)
		}
		late <- r.Mapping
	}})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	close(release)
	select {
	case id := <-late:
		if id != 42 {
			t.Fatal(id)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("no late reply")
	}
}

func TestEndWhileCallsAreInFlight(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(client, server *Link)
		want error
	}{
		{"client closes", func(c, _ *Link) { c.Close() }, ErrClosed},
		{"server closes", func(_, s *Link) { s.Close() }, ErrGone},
		{"server's socket ends", func(_, s *Link) { s.Conn().Close() }, ErrGone},
	} {
		t.Run(c.name, func(t *testing.T) {
			var running atomic.Int32
			client, server := links(t, func(ctx context.Context, _ *Message) (Reply, error) {
				running.Add(1)
				defer running.Add(-1)
				<-ctx.Done()
				return Reply{}, ctx.Err()
			}, nil)
			var wg sync.WaitGroup
			for range 2 * DefaultInFlight { // half of them wait for a slot
				wg.Go(func() {
					if _, err := client.Call(t.Context(), TypePopulate, Populate{}, nil); !errors.Is(err, c.want) {
						t.Errorf("got %v, want %v", err, c.want)
					}
					select {
					case <-client.Done():
					default:
						t.Error("a call failed before the connection had ended")
					}
				})
			}
			for running.Load() < DefaultInFlight {
				time.Sleep(time.Millisecond)
			}
			c.end(client, server)
			wg.Wait()
			server.Close()
			if n := running.Load(); n != 0 {
				t.Fatalf("%d handlers run after Close", n)
			}
			if _, err := client.Call(t.Context(), TypePopulate, Populate{}, nil); !errors.Is(err, c.want) {
				t.Fatalf("after the end: %v", err)
			}
		})
	}
}

// A peer that floods is refused, and cut off when it does not even read the refusals; another connection is not hurt.
func TestFlood(t *testing.T) {
	a, fd := rawPair(t)
	l := NewLink(a, &LinkOptions{InFlight: 4, Handler: func(ctx context.Context, _ *Message) (Reply, error) {
		<-ctx.Done()
		return Reply{}, ctx.Err()
	}})
	defer l.Close()
	other, _ := links(t, echo, nil)
	tv := unix.Timeval{Sec: 20}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	for seq := uint32(1); ; seq++ {
		err := unix.Sendmsg(fd, frame(Header{Version: Version, Type: TypeInfo, Seq: seq}, nil), nil, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if m, err := other.Call(t.Context(), TypeObjectOpen, ObjectOpen{}, nil); err != nil {
		t.Fatal(err)
	} else {
		m.Close()
	}
}

func TestFloodIsRefused(t *testing.T) {
	a, fd := rawPair(t)
	l := NewLink(a, &LinkOptions{InFlight: 4, Handler: func(ctx context.Context, _ *Message) (Reply, error) {
		<-ctx.Done()
		return Reply{}, ctx.Err()
	}})
	defer l.Close()
	for seq := uint32(1); seq <= 5; seq++ {
		raw(t, fd, frame(Header{Version: Version, Type: TypeInfo, Seq: seq}, nil))
	}
	b := make([]byte, MaxFrame)
	n, err := unix.Read(fd, b)
	if err != nil {
		t.Fatal(err)
	}
	h, err := ParseHeader(b[:n])
	if err != nil || h.Seq != 5 {
		t.Fatalf("%+v, %v", h, err)
	}
	if _, err := parseReply(h.Type, b[HeaderSize:n]); !errors.Is(err, emm.ResourceShortage) {
		t.Fatal(err)
	}
	// A number in use is refused as well.
	raw(t, fd, frame(Header{Version: Version, Type: TypeInfo, Seq: 1}, nil))
	if n, err = unix.Read(fd, b); err != nil {
		t.Fatal(err)
	}
	if _, err := parseReply(h.Type, b[HeaderSize:n]); !errors.Is(err, ErrMalformed) {
		t.Fatal(err)
	}
}

func TestUnaskedReplyEndsTheConnection(t *testing.T) {
	a, fd := rawPair(t)
	l := NewLink(a, nil)
	defer l.Close()
	raw(t, fd, frame(Header{Version: Version, Type: TypeInfo, Seq: 1, Flags: FlagReply}, nil))
	<-l.Done()
	if err := l.Err(); !errors.Is(err, ErrMalformed) {
		t.Fatal(err)
	}
}

// A reply that does not fit its type becomes an error at both ends, not a crash.
func TestBadReply(t *testing.T) {
	client, _ := links(t, func(_ context.Context, r *Message) (Reply, error) {
		if r.Type == TypeInfo {
			return Reply{Body: Cancel{}}, nil
		}
		return Reply{Body: ObjectPagesReply{}, Tail: make([]byte, MaxFrame)}, nil
	}, nil)
	for _, typ := range []Type{TypeInfo, TypeObjectPages} {
		var body any = Empty{}
		if typ == TypeObjectPages {
			body = ObjectPages{}
		}
		if _, err := client.Call(t.Context(), typ, body, nil); !errors.Is(err, ErrMalformed) {
			t.Fatalf("%v: %v", typ, err)
		}
	}
}

// A reply whose fd is not open becomes an error: its caller must not wait for ever.
func TestReplyThatCannotBeSent(t *testing.T) {
	client, _ := links(t, func(context.Context, *Message) (Reply, error) {
		return Reply{Body: MapReply{}, FDs: []int{1 << 24}}, nil
	}, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := client.Call(ctx, TypeMap, Map{}, nil); !errors.Is(err, unix.EBADF) {
		t.Fatal(err)
	}
	// The same on the caller's side.
	if _, err := client.Call(ctx, TypeTaskUffd, TaskUffd{}, &CallOptions{FDs: []int{1 << 24}}); !errors.Is(err, unix.EBADF) {
		t.Fatal(err)
	}
}

func TestServe(t *testing.T) {
	noNewFDs(t)
	a, b := pair(t)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, b, echo, nil) }()
	l := NewLink(a, nil)
	defer l.Close()
	if m, err := l.Call(t.Context(), TypeObjectOpen, ObjectOpen{}, nil); err != nil {
		t.Fatal(err)
	} else {
		m.Close()
	}
	cancel()
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	if _, err := l.Call(t.Context(), TypeObjectOpen, ObjectOpen{}, nil); !errors.Is(err, ErrGone) {
		t.Fatal(err)
	}
}

func BenchmarkCall(b *testing.B) {
	x, f, err := Pair()
	if err != nil {
		b.Fatal(err)
	}
	y, err := FileConn(f)
	f.Close()
	if err != nil {
		b.Fatal(err)
	}
	client, server := NewLink(x, nil), NewLink(y, &LinkOptions{Handler: echo})
	defer server.Close()
	defer client.Close()
	for b.Loop() {
		m, err := client.Call(b.Context(), TypeObjectOpen, ObjectOpen{}, nil)
		if err != nil {
			b.Fatal(err)
		}
		m.Close()
	}
}
