package ipc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestSendRecv(t *testing.T) {
	noNewFDs(t)
	a, b := pair(t)
	f := temp(t)
	for _, n := range []int{0, 1, 4096, MaxBody} {
		body := bytes.Repeat([]byte{byte(n)}, n)
		if err := a.Send(t.Context(), Header{Type: TypeObjectCreate, Seq: 7}, body, int(f.Fd()), int(f.Fd())); err != nil {
			t.Fatal(err)
		}
		m, err := b.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if m.Version != Version || m.Type != TypeObjectCreate || m.Seq != 7 || m.Reply() || !bytes.Equal(m.Body, body) || m.NumFDs() != 2 {
			t.Fatalf("%d bytes came as %+v", n, m.Header)
		}
		for i := range 2 {
			flags, err := unix.FcntlInt(uintptr(m.FD(i)), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Fatalf("fd %d: flags %#x, %v", i, flags, err)
			}
		}
		fd := m.TakeFD(1)
		m.Close()
		m.Close()
		if m.TakeFD(1) != -1 || unix.Close(fd) != nil {
			t.Fatal("a taken fd was closed")
		}
	}
	if err := a.Send(t.Context(), Header{}, make([]byte, MaxBody+1)); !errors.Is(err, ErrMalformed) {
		t.Fatalf("oversized body: %v", err)
	}
	if err := a.Send(t.Context(), Header{}, nil, 0, 0, 0); !errors.Is(err, ErrMalformed) {
		t.Fatalf("three fds: %v", err)
	}
}

// raw sends one packet past Conn.
func raw(t *testing.T, fd int, frame []byte, fds ...int) {
	t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(fd, frame, oob, nil, 0); err != nil {
		t.Fatal(err)
	}
}

func frame(h Header, body []byte) []byte { return append(h.append(nil), body...) }

func TestRecvRefuses(t *testing.T) {
	noNewFDs(t)
	f := temp(t)
	fds := func(n int) []int {
		s := make([]int, n)
		for i := range s {
			s[i] = int(f.Fd())
		}
		return s
	}
	good := Header{Version: Version, Type: TypeInfo, Seq: 9}
	with := func(change func(*Header)) Header { h := good; change(&h); return h }
	for _, c := range []struct {
		name   string
		frame  []byte
		fds    int
		want   error
		header bool
	}{
		{"three fds", frame(with(func(h *Header) { h.FDs = 3 }), nil), 3, ErrMalformed, true},
		{"253 fds", frame(with(func(h *Header) { h.FDs = 253 }), nil), 253, ErrMalformed, true},
		{"an fd more than said", frame(with(func(h *Header) { h.FDs = 1 }), nil), 2, ErrMalformed, true},
		{"an fd less than said", frame(with(func(h *Header) { h.FDs = 1 }), nil), 0, ErrMalformed, true},
		{"short header", frame(good, nil)[:HeaderSize-1], 2, ErrMalformed, false},
		{"one byte", []byte{1}, 0, ErrMalformed, false},
		{"longer than said", frame(good, []byte{1}), 1, ErrMalformed, true},
		{"shorter than said", frame(with(func(h *Header) { h.Length = 5 }), []byte{1}), 1, ErrMalformed, true},
		{"longer than a frame", frame(with(func(h *Header) { h.Length = MaxBody + 1 }), make([]byte, MaxBody+1)), 1, ErrMalformed, true},
		{"twice a frame", frame(good, make([]byte, 2*MaxFrame)), 1, ErrMalformed, true},
		{"length of 4 GiB", frame(with(func(h *Header) { h.Length = 1<<32 - 1 }), nil), 0, ErrMalformed, true},
		{"unknown flag", frame(with(func(h *Header) { h.Flags = 4 }), nil), 0, ErrMalformed, true},
		{"a reply that was sent before", frame(with(func(h *Header) { h.Flags = FlagReply | FlagResend }), nil), 0, ErrMalformed, true},
		{"other version", frame(with(func(h *Header) { h.Version = 2 }), []byte("anything")), 1, ErrVersion, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			noNewFDs(t)
			a, fd := rawPair(t)
			raw(t, fd, c.frame, fds(c.fds)...)
			m, err := a.Recv()
			if !errors.Is(err, c.want) || (m != nil) != c.header {
				t.Fatalf("got %+v, %v", m, err)
			}
			if m != nil && (m.Seq != 9 || m.NumFDs() != 0 || m.Body != nil) {
				t.Fatalf("refused frame came as %+v", m)
			}
			// The connection goes on.
			raw(t, fd, frame(good, nil))
			if m, err := a.Recv(); err != nil || m.Type != TypeInfo {
				t.Fatalf("next frame: %+v, %v", m, err)
			}
		})
	}
}

// An empty packet with fds looks like the end of the connection; its fds must not leak.
func TestRecvEmptyPacketWithFDs(t *testing.T) {
	noNewFDs(t)
	f := temp(t)
	a, fd := rawPair(t)
	raw(t, fd, nil, int(f.Fd()), int(f.Fd()))
	if m, err := a.Recv(); err == nil {
		t.Fatalf("came as %+v", m)
	}
}

func TestRecvWithoutRoomForFDs(t *testing.T) {
	noNewFDs(t)
	a, b := pair(t)
	f := temp(t)
	if err := a.Send(t.Context(), Header{Type: TypeMap, Seq: 3, Flags: FlagReply}, nil, int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	none := old
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	m, err := b.Recv()
	if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); e != nil {
		t.Fatal(e)
	}
	if !errors.Is(err, ErrMalformed) || m == nil || m.Seq != 3 {
		t.Fatalf("got %+v, %v", m, err)
	}
}

func TestPeerGone(t *testing.T) {
	a, b := pair(t)
	b.Close()
	if _, err := a.Recv(); !errors.Is(err, ErrGone) {
		t.Fatalf("receive: %v", err)
	}
	if err := a.Send(t.Context(), Header{}, nil); !errors.Is(err, ErrGone) {
		t.Fatalf("send: %v", err)
	}
}

func TestCloseEndsWaits(t *testing.T) {
	a, _ := pair(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := a.Recv(); !errors.Is(err, ErrClosed) {
				t.Errorf("receive: %v", err)
			}
		})
		wg.Go(func() {
			for {
				if err := a.Send(t.Context(), Header{}, make([]byte, MaxBody)); err != nil {
					if !errors.Is(err, ErrClosed) {
						t.Errorf("send: %v", err)
					}
					return
				}
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	for range 3 {
		wg.Go(func() { a.Close() })
	}
	wg.Wait()
}

// A peer that does not read holds up a send until its context ends; the next sender is not hurt.
func TestSendContext(t *testing.T) {
	a, b := pair(t)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := a.Send(ctx, Header{Type: TypeInfo}, make([]byte, MaxBody))
		cancel()
		if err != nil {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			break
		}
	}
	go func() {
		for {
			if _, err := b.Recv(); err != nil {
				return
			}
		}
	}()
	for range 100 {
		if err := a.Send(t.Context(), Header{Type: TypeInfo}, make([]byte, MaxBody)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPeerCredentials(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := DialConn(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	uc, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewConn(uc)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for _, c := range []*Conn{a, b} {
		cred, err := c.Peer()
		if err != nil || int(cred.Pid) != os.Getpid() || int(cred.Uid) != os.Getuid() || int(cred.Gid) != os.Getgid() {
			t.Fatalf("%+v, %v", cred, err)
		}
	}
	b.Close()
	if _, err := b.Peer(); err == nil {
		t.Fatal("credentials of a closed connection")
	}
}

func TestWrongSockets(t *testing.T) {
	noNewFDs(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "stream")
	defer f.Close()
	defer unix.Close(fds[1])
	if _, err := FileConn(f); !errors.Is(err, unix.EPROTOTYPE) {
		t.Fatalf("stream socket: %v", err)
	}
	if _, err := FileConn(temp(t)); err == nil {
		t.Fatal("a regular file made a connection")
	}
	if _, err := DialConn(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, unix.ENOENT) {
		t.Fatalf("no socket: %v", err)
	}
}

func TestKinds(t *testing.T) {
	device, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	uffd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|1, 0, 0) // user mode only: needs no privilege
	if errno != 0 {
		t.Fatal(errno)
	}
	defer unix.Close(int(uffd))
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	_, socket := rawPair(t)
	fds := map[Kind]int{KindUffd: int(uffd), KindFile: int(temp(t).Fd()), KindDevice: int(device.Fd()), KindSocket: socket, KindAny: int(dir.Fd())}
	for want := range fds {
		for is, fd := range fds {
			err := CheckKind(fd, want)
			if ok := is == want || want == KindAny; ok != (err == nil) || !ok && !errors.Is(err, ErrMalformed) {
				t.Errorf("kind %d where %d is wanted: %v", is, want, err)
			}
		}
	}
}

func TestHeaderLayout(t *testing.T) {
	h := Header{Version: 1, Type: 0x0203, Seq: 0x04050607, Length: 0, Flags: 1, FDs: 2}
	b := h.append(nil)
	if want := []byte{1, 0, 3, 2, 7, 6, 5, 4, 0, 0, 0, 0, 1, 0, 2, 0}; !bytes.Equal(b, want) || binary.Size(h) != HeaderSize {
		t.Fatalf("% x, want % x", b, want)
	}
	if got, err := ParseHeader(b); err != nil || got != h {
		t.Fatalf("%+v, %v", got, err)
	}
}
