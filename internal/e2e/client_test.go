package e2e

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/uffd"
)

// bystander is a task that uses the same pager while others misbehave.
type bystander struct {
	t    *testing.T
	k    *task
	size int64
	v    uint64
}

func newBystander(t *testing.T, socket string) *bystander {
	b := &bystander{t: t, k: start(t, "mirror", nil), size: 100<<10 + 5}
	b.k.send(mirrorArg{At: At{socket}, Size: b.size, PageSize: 4096})
	var port emm.Port
	b.k.recv(&port)
	return b
}

func (b *bystander) do(o op) opResult {
	b.t.Helper()
	b.k.send(o)
	var res opResult
	b.k.recv(&res)
	if res.Err != "" {
		b.t.Fatalf("bystander: %v: %s", o, res.Err)
	}
	return res
}

// check writes, pages out, and reads back.
func (b *bystander) check(after string) {
	b.t.Helper()
	b.v++
	b.do(op{Kind: opWrite, N: b.size, Contents: b.v})
	b.do(op{Kind: opPageOut, N: b.size})
	want := make([]byte, b.size)
	fill(want, 0, b.v)
	if at := firstDiff(b.do(op{Kind: opRead, N: b.size}).Data, want); at >= 0 {
		b.t.Fatalf("after %s: the bystander reads a wrong byte at %d", after, at)
	}
}

// openUffd makes a userfaultfd of this process.
func openUffd(t *testing.T, o *uffd.OpenOptions) int {
	t.Helper()
	fd, err := uffd.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fd.Close() })
	return fd.Fd()
}

// client is a task that speaks the protocol and means no good.
type client struct {
	t  *testing.T
	l  *ipc.Link
	fd *uffd.FD
}

func newClient(t *testing.T, socket string) *client {
	t.Helper()
	ctx := context.Background()
	conn, err := ipc.DialConn(ctx, socket)
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, l: ipc.NewLink(conn, nil)}
	t.Cleanup(func() { c.l.Close() })
	if c.fd, err = uffd.Open(&uffd.OpenOptions{Features: uffd.RequiredFeatures}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.fd.Close() })
	c.must(ipc.TypeHello, ipc.Hello{}).Close()
	c.must(ipc.TypeTaskUffd, ipc.TaskUffd{Features: uint64(c.fd.Features())}, c.fd.Fd()).Close()
	return c
}

func (c *client) call(typ ipc.Type, body any, fds ...int) (*ipc.Message, error) {
	return callByHand(c.l, 10*time.Second, typ, body, fds)
}

// callByHand calls with what a good task would send, but for what the body says.
func callByHand(l *ipc.Link, limit time.Duration, typ ipc.Type, body any, fds []int) (*ipc.Message, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	o := &ipc.CallOptions{FDs: fds}
	if typ == ipc.TypeObjectCreate || typ == ipc.TypeAllocate {
		o.Tail, _ = ipc.AppendStrings(nil, "", "")
	}
	return l.Call(ctx, typ, body, o)
}

func (c *client) must(typ ipc.Type, body any, fds ...int) *ipc.Message {
	c.t.Helper()
	m, err := c.call(typ, body, fds...)
	if err != nil {
		c.t.Fatalf("%v: %v", typ, err)
	}
	return m
}

// answered is a call that may fail, but not hang.
func (c *client) answered(typ ipc.Type, body any) {
	c.t.Helper()
	if m, err := c.call(typ, body); err == nil {
		m.Close()
	} else if errors.Is(err, context.DeadlineExceeded) {
		c.t.Errorf("%v is not answered: %v", typ, err)
	}
}

// create makes an object and returns its handle and port.
func (c *client) create(size int64) (uint64, emm.Port) {
	c.t.Helper()
	m := c.must(ipc.TypeObjectCreate, ipc.ObjectCreate{Size: size})
	defer m.Close()
	r, _, err := ipc.Decode[ipc.ObjectReply](m.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return r.Handle, r.Port
}

// prepare is the first half of vm_map. The file is closed again.
func (c *client) prepare(handle uint64, size int64) (mapping uint64, file int) {
	c.t.Helper()
	m := c.must(ipc.TypeMap, ipc.Map{Handle: handle, Size: size})
	r, _, err := ipc.Decode[ipc.MapReply](m.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	file = m.TakeFD(0)
	c.t.Cleanup(func() { unix.Close(file) })
	return r.Mapping, file
}

// memory maps a file, or none, in this process, which never touches it.
func (c *client) memory(file int, size int) uint64 {
	c.t.Helper()
	flags := unix.MAP_SHARED
	if file < 0 {
		flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	}
	b, err := unix.Mmap(file, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { unix.Munmap(b) })
	return addressOf(b)
}
