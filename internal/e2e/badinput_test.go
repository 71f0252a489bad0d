package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/uffd"
)

// frame makes the bytes of a frame with whatever header it is told.
func frame(version uint16, typ ipc.Type, seq, length uint32, flags, fds uint16, body []byte) []byte {
	b := binary.LittleEndian.AppendUint16(nil, version)
	b = binary.LittleEndian.AppendUint16(b, uint16(typ))
	b = binary.LittleEndian.AppendUint32(b, seq)
	b = binary.LittleEndian.AppendUint32(b, length)
	b = binary.LittleEndian.AppendUint16(b, flags)
	b = binary.LittleEndian.AppendUint16(b, fds)
	return append(b, body...)
}

// good is a correct frame.
func good(typ ipc.Type, fixed any, fds uint16) []byte {
	body, err := ipc.AppendFixed(nil, fixed)
	if err != nil {
		panic(err)
	}
	return frame(ipc.Version, typ, 7, uint32(len(body)), 0, fds, body)
}

// rawDial connects without any greeting.
func rawDial(t *testing.T, socket string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

// answer reads one frame and returns the text of its error; "closed" if the connection ended instead, "" for a success.
func answer(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	buf, oob := make([]byte, ipc.MaxFrame), make([]byte, 1024)
	n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
	closeRights(oob[:oobn])
	if err != nil || n == 0 {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("no answer within 10 s")
		}
		return "closed"
	}
	h, err := ipc.ParseHeader(buf[:n])
	if err != nil || !h.Reply() {
		t.Fatalf("answer %+v: %v", h, err)
	}
	s, text, err := ipc.Decode[ipc.Status](buf[ipc.HeaderSize:n])
	if err != nil {
		t.Fatal(err)
	}
	if s == (ipc.Status{}) {
		return ""
	}
	return string(text)
}

func closeRights(oob []byte) {
	msgs, _ := unix.ParseSocketControlMessage(oob)
	for i := range msgs {
		fds, _ := unix.ParseUnixRights(&msgs[i])
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
}

// TestBadFrames sends what is no message. The client gets a clear error or is cut off, and nobody else notices.
func TestBadFrames(t *testing.T) {
	socket, pager := pagerAt(t, pagerOptions{})
	other := newBystander(t, socket)
	other.check("nothing")
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	defer pw.Close()
	pipe := int(pr.Fd())
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()

	hello := good(ipc.TypeHello, ipc.Hello{}, 0)
	create := good(ipc.TypeObjectCreate, ipc.ObjectCreate{Size: 4096}, 0)
	long := make([]byte, ipc.MaxFrame+4096)
	copy(long, frame(ipc.Version, ipc.TypeObjectCreate, 7, uint32(len(long)-ipc.HeaderSize), 0, 0, nil))
	for _, c := range []struct {
		name   string
		first  []byte // before it, answered with success
		packet []byte
		fds    []int
		want   string // part of the error's text; "closed" if the connection may end instead
	}{
		{"three bytes", nil, []byte{1, 2, 3}, nil, "closed"},
		{"half a header", hello, hello[:10], nil, "closed"},
		{"another version", nil, frame(99, ipc.TypeHello, 7, 16, 0, 0, make([]byte, 16)), nil, "version"},
		{"a length that lies", hello, frame(ipc.Version, ipc.TypeInfo, 7, 1000, 0, 0, nil), nil, "malformed"},
		{"unknown flags", hello, frame(ipc.Version, ipc.TypeInfo, 7, 0, 0x80, 0, nil), nil, "malformed"},
		{"an unknown type", hello, frame(ipc.Version, 999, 7, 0, 0, 0, nil), nil, "unknown"},
		{"a message for guardians", hello, frame(ipc.Version, ipc.TypeReady, 7, 0, 0, 0, nil), nil, "unknown"},
		{"a reply nobody asked for", hello, frame(ipc.Version, ipc.TypeInfo, 7, 16, ipc.FlagReply, 0, make([]byte, 16)), nil, "closed"},
		{"a short body", hello, frame(ipc.Version, ipc.TypeObjectOpen, 7, 3, 0, 0, []byte{1, 2, 3}), nil, "malformed"},
		{"a tail of garbage", hello, frame(ipc.Version, ipc.TypeObjectCreate, 7, uint32(len(create)-ipc.HeaderSize)+3, 0, 0, append(create[ipc.HeaderSize:], 9, 9, 9)), nil, "malformed"},
		{"a packet too long", hello, long, nil, "malformed"},
		{"no greeting", nil, create, nil, "Hello"},
		{"two greetings", hello, hello, nil, "Hello"},
		{"a fd that was not announced", hello, good(ipc.TypeInfo, ipc.Empty{}, 0), []int{pipe}, "malformed"},
		{"a fd where none belongs", hello, good(ipc.TypeInfo, ipc.Empty{}, 1), []int{pipe}, "malformed"},
		{"too many fds", hello, good(ipc.TypeTaskUffd, ipc.TaskUffd{}, 5), []int{pipe, pipe, pipe, pipe, pipe}, "malformed"},
		{"a fd that is missing", hello, good(ipc.TypeTaskUffd, ipc.TaskUffd{}, 1), nil, "malformed"},
		{"a pipe for a userfaultfd", hello, good(ipc.TypeTaskUffd, ipc.TaskUffd{Features: uint64(uffd.RequiredFeatures)}, 1), []int{pipe}, "userfaultfd"},
		{"a file for a userfaultfd", hello, good(ipc.TypeTaskUffd, ipc.TaskUffd{Features: uint64(uffd.RequiredFeatures)}, 1), []int{int(file.Fd())}, "userfaultfd"},
		{"a userfaultfd without features", hello, good(ipc.TypeTaskUffd, ipc.TaskUffd{}, 1), []int{openUffd(t, nil)}, "lacks"},
		{"a mapping without a userfaultfd", hello, good(ipc.TypeMap, ipc.Map{Handle: 1, Size: 4096}, 0), nil, "handle"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := rawDial(t, socket)
			if c.first != nil {
				if _, err := conn.Write(c.first); err != nil {
					t.Fatal(err)
				}
				if text := answer(t, conn); text != "" {
					t.Fatalf("greeting: %s", text)
				}
			}
			var oob []byte
			if c.fds != nil {
				oob = unix.UnixRights(c.fds...)
			}
			if _, _, err := conn.WriteMsgUnix(c.packet, oob, nil); err != nil {
				t.Fatal(err)
			}
			if text := answer(t, conn); !strings.Contains(text, c.want) && !(c.want == "closed" && text != "") {
				t.Errorf("answered with %q, want %q in it", text, c.want)
			}
		})
	}
	other.check("bad frames")

	// Noise: random packets on many connections, and correct frames with bits turned.
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		conn := rawDial(t, socket)
		if rng.IntN(2) == 0 {
			conn.Write(hello)
		}
		for range rng.IntN(20) {
			p := make([]byte, rng.IntN(200))
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			if rng.IntN(2) == 0 {
				p = append([]byte(nil), create...)
				p[rng.IntN(len(p))] ^= 1 << rng.IntN(8)
			}
			if len(p) == 0 {
				continue
			}
			if _, err := conn.Write(p); err != nil {
				break // cut off
			}
		}
		conn.Close()
	}
	// A flood whose answers nobody reads.
	conn := rawDial(t, socket)
	conn.Write(hello)
	conn.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	for i := range uint32(100000) {
		if _, err := conn.Write(frame(ipc.Version, ipc.TypeInfo, i+10, 0, 0, 0, nil)); err != nil {
			break
		}
	}
	other.check("noise")
	conn.Close()
	other.k.send(op{Kind: opEnd})
	other.k.wait()
	for _, pid := range descendants(pager.cmd.Process.Pid) {
		eventually(t, 5*time.Second, fmt.Sprintf("process %d has closed what it was sent: %+v", pid, holdingsOf(pid)), func() bool { return holdingsOf(pid).FDs < 64 })
	}
}

// TestBadRequests sends well-formed messages whose numbers are wrong.
func TestBadRequests(t *testing.T) {
	socket, _ := pagerAt(t, pagerOptions{})
	other := newBystander(t, socket)
	c, d := newClient(t, socket), newClient(t, socket)
	const size = 64 << 10
	handle, port := c.create(size)
	mapping, _ := c.prepare(handle, size)

	for _, q := range []struct {
		name string
		typ  ipc.Type
		body any
		want error
	}{
		{"an object of no bytes", ipc.TypeObjectCreate, ipc.ObjectCreate{}, emm.InvalidArgument},
		{"an object of -1 bytes", ipc.TypeObjectCreate, ipc.ObjectCreate{Size: -1}, emm.InvalidArgument},
		{"an object of 2^63-1 bytes", ipc.TypeObjectCreate, ipc.ObjectCreate{Size: 1<<63 - 1}, nil},
		{"pages of 5000 bytes", ipc.TypeObjectCreate, ipc.ObjectCreate{Size: 1, PageSize: 5000}, emm.InvalidArgument},
		{"pages of 2048 bytes", ipc.TypeObjectCreate, ipc.ObjectCreate{Size: 1, PageSize: 2048}, emm.InvalidArgument},
		{"pages of 4 MiB", ipc.TypeObjectCreate, ipc.ObjectCreate{Size: 1, PageSize: 4 << 20}, emm.InvalidArgument},
		{"clusters of 3 bytes", ipc.TypeObjectCreate, ipc.ObjectCreate{Size: 1, ClusterSize: 3}, emm.InvalidArgument},
		{"unknown flags", ipc.TypeObjectCreate, ipc.ObjectCreate{Size: 1, Flags: 1 << 20}, emm.InvalidArgument},
		{"the null port", ipc.TypeObjectOpen, ipc.ObjectOpen{}, emm.InvalidArgument},
		{"an unknown port", ipc.TypeObjectOpen, ipc.ObjectOpen{Port: emm.NewPort()}, emm.InvalidArgument},
		{"close of an unknown handle", ipc.TypeObjectClose, ipc.ObjectClose{Handle: 99}, emm.InvalidName},
		{"map of an unknown handle", ipc.TypeMap, ipc.Map{Handle: 99, Size: 4096}, emm.InvalidName},
		{"map of nothing", ipc.TypeMap, ipc.Map{Handle: handle}, emm.InvalidArgument},
		{"map of -4096 bytes", ipc.TypeMap, ipc.Map{Handle: handle, Size: -4096}, emm.InvalidArgument},
		{"map of half a page", ipc.TypeMap, ipc.Map{Handle: handle, Size: 2048}, emm.InvalidArgument},
		{"map at a negative offset", ipc.TypeMap, ipc.Map{Handle: handle, Offset: -4096, Size: 4096}, emm.InvalidArgument},
		{"map within a page", ipc.TypeMap, ipc.Map{Handle: handle, Offset: 1, Size: 4096}, emm.InvalidArgument},
		{"map beyond the end", ipc.TypeMap, ipc.Map{Handle: handle, Offset: size, Size: 4096}, emm.InvalidArgument},
		{"map over the end", ipc.TypeMap, ipc.Map{Handle: handle, Size: size + 4096}, emm.InvalidArgument},
		{"map that overflows", ipc.TypeMap, ipc.Map{Handle: handle, Offset: 4096, Size: 1<<63 - 4096}, emm.InvalidArgument},
		{"map with unknown flags", ipc.TypeMap, ipc.Map{Handle: handle, Size: 4096, Flags: 1 << 9}, emm.InvalidArgument},
		{"ready of an unknown mapping", ipc.TypeMapReady, ipc.MapReady{Mapping: 1 << 40, Address: 4096}, emm.InvalidName},
		{"ready at 0", ipc.TypeMapReady, ipc.MapReady{Mapping: mapping}, emm.InvalidAddress},
		{"ready within a page", ipc.TypeMapReady, ipc.MapReady{Mapping: mapping, Address: 12345}, emm.InvalidAddress},
		{"ready in the kernel", ipc.TypeMapReady, ipc.MapReady{Mapping: mapping, Address: 0xffff_8000_0000_0000}, emm.InvalidAddress},
		{"ready at the top", ipc.TypeMapReady, ipc.MapReady{Mapping: mapping, Address: 1<<64 - 4096}, emm.InvalidAddress},
		{"ready where nothing is mapped", ipc.TypeMapReady, ipc.MapReady{Mapping: mapping, Address: 1 << 20}, emm.InvalidAddress},
		{"unmap of an unknown mapping", ipc.TypeUnmap, ipc.Unmap{Mapping: 1 << 40}, emm.InvalidName},
		{"populate of an unknown mapping", ipc.TypePopulate, ipc.Populate{Mapping: 1 << 40, Size: 4096}, emm.InvalidName},
		{"populate over the end", ipc.TypePopulate, ipc.Populate{Mapping: mapping, Size: size + 4096}, emm.InvalidArgument},
		{"page out at a negative offset", ipc.TypePageOut, ipc.PageOut{Mapping: mapping, Offset: -4096, Size: 8192}, emm.InvalidArgument},
		{"page out of half a page", ipc.TypePageOut, ipc.PageOut{Mapping: mapping, Size: 100}, emm.InvalidArgument},
		{"reason beyond the end", ipc.TypeFaultReason, ipc.FaultReason{Mapping: mapping, Offset: size}, emm.InvalidArgument},
		{"pages of an unknown handle", ipc.TypeObjectPages, ipc.ObjectPages{Handle: 99}, emm.InvalidName},
		{"too many pages", ipc.TypeObjectPages, ipc.ObjectPages{Handle: handle, Count: 1 << 31}, emm.InvalidArgument},
	} {
		t.Run(q.name, func(t *testing.T) {
			m, err := c.call(q.typ, q.body)
			if err == nil {
				m.Close()
			}
			var re *ipc.RemoteError
			if !errors.As(err, &re) || q.want != nil && !errors.Is(err, q.want) {
				t.Errorf("answered with %v, want %v", err, q.want)
			}
		})
	}
	// Numbers of another connection are nothing here, the port of another is.
	if _, err := d.call(ipc.TypeObjectClose, ipc.ObjectClose{Handle: handle}); !errors.Is(err, emm.InvalidName) {
		t.Errorf("close of a foreign handle: %v", err)
	}
	if _, err := d.call(ipc.TypeUnmap, ipc.Unmap{Mapping: mapping}); !errors.Is(err, emm.InvalidName) {
		t.Errorf("unmap of a foreign mapping: %v", err)
	}
	d.must(ipc.TypeObjectOpen, ipc.ObjectOpen{Port: port}).Close()
	if _, err := c.call(ipc.TypeTaskUffd, ipc.TaskUffd{Features: uint64(c.fd.Features())}, c.fd.Fd()); !errors.Is(err, emm.InvalidArgument) {
		t.Errorf("a second userfaultfd: %v", err)
	}
	other.check("bad requests")
}

// TestLiars claims ranges that are not what they should be.
func TestLiars(t *testing.T) {
	socket, _ := pagerAt(t, pagerOptions{})
	other := newBystander(t, socket)
	const size = 16 * 4096
	all := uffd.RegisterMissing | uffd.RegisterMinor | uffd.RegisterWP
	type claim struct {
		c       *client
		file    int
		mapping uint64
	}
	begin := func(t *testing.T) (cl claim) {
		cl.c = newClient(t, socket)
		h, _ := cl.c.create(size)
		cl.mapping, cl.file = cl.c.prepare(h, size)
		return cl
	}
	serve := func(t *testing.T) (cl claim, addr uint64) { // nothing is wrong yet
		cl = begin(t)
		addr = cl.c.memory(cl.file, size)
		if _, err := cl.c.fd.Register(addr, size, all); err != nil {
			t.Fatal(err)
		}
		cl.c.must(ipc.TypeMapReady, ipc.MapReady{Mapping: cl.mapping, Address: addr}).Close()
		return cl, addr
	}
	refused := func(t *testing.T, cl claim, addr uint64) {
		t.Helper()
		if _, err := cl.c.call(ipc.TypeMapReady, ipc.MapReady{Mapping: cl.mapping, Address: addr}); !errors.Is(err, emm.InvalidAddress) {
			t.Errorf("answered with %v, want %v", err, emm.InvalidAddress)
		}
	}
	t.Run("nothing registered", func(t *testing.T) {
		cl := begin(t)
		refused(t, cl, cl.c.memory(cl.file, size))
	})
	t.Run("half registered", func(t *testing.T) {
		cl := begin(t)
		addr := cl.c.memory(cl.file, size)
		if _, err := cl.c.fd.Register(addr, size/2, all); err != nil {
			t.Fatal(err)
		}
		refused(t, cl, addr)
	})
	t.Run("not for write-protection", func(t *testing.T) {
		cl := begin(t)
		addr := cl.c.memory(cl.file, size)
		if _, err := cl.c.fd.Register(addr, size, uffd.RegisterMissing|uffd.RegisterMinor); err != nil {
			t.Fatal(err)
		}
		refused(t, cl, addr)
	})
	t.Run("the same range twice", func(t *testing.T) {
		cl, addr := serve(t)
		h, _ := cl.c.create(size)
		second, _ := cl.c.prepare(h, size)
		if _, err := cl.c.call(ipc.TypeMapReady, ipc.MapReady{Mapping: second, Address: addr}); err == nil {
			t.Error("the pager serves two mappings at one address")
		}
		if _, err := cl.c.call(ipc.TypeMapReady, ipc.MapReady{Mapping: cl.mapping, Address: addr}); err == nil {
			t.Error("a mapping was started twice")
		}
	})
	t.Run("other memory than the object's", func(t *testing.T) {
		cl := begin(t)
		addr := cl.c.memory(-1, size)
		if _, err := cl.c.fd.Register(addr, size, uffd.RegisterMissing|uffd.RegisterWP); err != nil {
			t.Fatal(err)
		}
		// The pager cannot see the difference, and need not: what it fills is the liar's.
		if _, err := cl.c.call(ipc.TypeMapReady, ipc.MapReady{Mapping: cl.mapping, Address: addr}); err != nil {
			return
		}
		for _, write := range []uint32{0, ipc.PopulateWrite} {
			cl.c.answered(ipc.TypePopulate, ipc.Populate{Mapping: cl.mapping, Size: size, Flags: write})
			other.check("a liar's populate")
			cl.c.answered(ipc.TypePageOut, ipc.PageOut{Mapping: cl.mapping, Size: size})
			other.check("a liar's page-out")
		}
	})
	t.Run("unmapped behind the pager's back", func(t *testing.T) {
		cl, addr := serve(t)
		cl.c.must(ipc.TypePopulate, ipc.Populate{Mapping: cl.mapping, Size: size, Flags: ipc.PopulateWrite}).Close()
		if err := cl.c.fd.Unregister(addr, size); err != nil {
			t.Fatal(err)
		}
		cl.c.answered(ipc.TypePopulate, ipc.Populate{Mapping: cl.mapping, Size: size})
		cl.c.answered(ipc.TypePageOut, ipc.PageOut{Mapping: cl.mapping, Size: size})
		other.check("an unregistered mapping")
	})
	t.Run("truncated behind the pager's back", func(t *testing.T) {
		cl, _ := serve(t)
		cl.c.must(ipc.TypePopulate, ipc.Populate{Mapping: cl.mapping, Size: size, Flags: ipc.PopulateWrite}).Close()
		if err := unix.Ftruncate(cl.file, 4096); err != nil {
			t.Logf("the file cannot be truncated: %v", err)
		}
		cl.c.answered(ipc.TypePageOut, ipc.PageOut{Mapping: cl.mapping, Size: size})
		cl.c.answered(ipc.TypePopulate, ipc.Populate{Mapping: cl.mapping, Size: size, Flags: ipc.PopulateWrite})
		other.check("a truncated file")
	})
	other.check("liars")
	other.k.send(op{Kind: opEnd})
	other.k.wait()
}
