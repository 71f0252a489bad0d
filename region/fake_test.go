//go:build linux

package region

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/uffd"
)

// fake is a pager process for tests: memory objects in memfds, faults of real tasks, and failures on request. Page n of an object reads as
// n+1 in every byte until it is written. An object's argument names pages by a letter and a number, separated by commas:
//
//	b3  the store fails on page 3 until somebody has asked for the reason
//	s4  nobody answers for page 4 until the page is populated
//	m   Map answers late, whatever the caller does
//	w   everything is filled write-protected
type fake struct {
	device bool // hand out /dev/userfaultfd

	mu       sync.Mutex
	uffd     *uffd.FD // the one task's
	objects  map[uint64]*fakeObject
	mappings map[uint64]*fakeMapping
	last     uint64
	maps     int64 // mappings ever made
}

type fakeObject struct {
	file      *os.File
	size      int64 // whole pages
	page      int64
	port      emm.Port
	bad       map[int64]bool
	stuck     map[int64]bool
	stored    map[int64][]byte
	slow, wpd bool
}

type fakeMapping struct {
	o            *fakeObject
	offset, size int64
	address      uint64 // 0: not ready
	readOnly     bool
}

// runFake serves the socket at fd 3 until it ends.
func runFake(device bool) {
	socket := os.NewFile(3, "socket")
	conn, err := ipc.FileConn(socket)
	if err != nil {
		panic(err)
	}
	socket.Close()
	f := &fake{device: device, objects: map[uint64]*fakeObject{}, mappings: map[uint64]*fakeMapping{}}
	if err := ipc.Serve(context.Background(), conn, f.handle, nil); err != nil {
		panic(err)
	}
}

func answer[T any](r *ipc.Message, f func(T, []byte) (ipc.Reply, error)) (ipc.Reply, error) {
	q, tail, err := ipc.Decode[T](r.Body)
	if err != nil {
		return ipc.Reply{}, err
	}
	return f(q, tail)
}

func (f *fake) handle(ctx context.Context, r *ipc.Message) (ipc.Reply, error) {
	switch r.Type {
	case ipc.TypeHello:
		reply := ipc.Reply{Body: ipc.HelloReply{Session: 1, PagerPID: int32(os.Getpid()), Tier: 'A'}, Tail: []byte("a fake, as root")}
		if f.device {
			dev, err := os.OpenFile(uffd.DevicePath, os.O_RDWR, 0)
			if err != nil {
				return ipc.Reply{}, err
			}
			reply.FDs, reply.Done = []int{int(dev.Fd())}, func() { dev.Close() }
		}
		return reply, nil
	case ipc.TypeTaskUffd:
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.uffd != nil {
			return ipc.Reply{}, fmt.Errorf("a second userfaultfd: %w", emm.InvalidArgument)
		}
		f.uffd = uffd.FromFd(r.TakeFD(0))
		go f.read(f.uffd)
		return ipc.Reply{}, nil
	case ipc.TypeObjectCreate, ipc.TypeAllocate:
		return answer(r, func(q ipc.ObjectCreate, tail []byte) (ipc.Reply, error) { return f.create(r, q, tail) })
	case ipc.TypeObjectOpen:
		return answer(r, f.open)
	case ipc.TypeObjectClose:
		return answer(r, func(q ipc.ObjectClose, _ []byte) (ipc.Reply, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.objects[q.Handle] == nil {
				return ipc.Reply{}, emm.InvalidArgument
			}
			delete(f.objects, q.Handle)
			return ipc.Reply{}, nil
		})
	case ipc.TypeMap:
		return answer(r, f.mapObject)
	case ipc.TypeMapReady:
		return answer(r, func(q ipc.MapReady, _ []byte) (ipc.Reply, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.mappings[q.Mapping].address = q.Address
			return ipc.Reply{}, nil
		})
	case ipc.TypeUnmap:
		return answer(r, func(q ipc.Unmap, _ []byte) (ipc.Reply, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			delete(f.mappings, q.Mapping)
			return ipc.Reply{}, nil
		})
	case ipc.TypePopulate:
		return answer(r, func(q ipc.Populate, _ []byte) (ipc.Reply, error) { return f.populate(ctx, q) })
	case ipc.TypePageOut:
		return answer(r, f.pageOut)
	case ipc.TypeFaultReason:
		return answer(r, f.reason)
	case ipc.TypeRegionStats:
		return ipc.Reply{Body: ipc.RegionStatsReply{ZeroFilled: 1, Stored: 2, Minor: 3, WriteProtect: 4, Errors: 5, PagesIn: 6, PagesOut: 7, Resident: 8, Dirty: 9,
			Latency: ipc.Latency{Count: 10, P50: 11, P99: 12, Max: 13}}}, nil
	case ipc.TypeObjectPages:
		return answer(r, func(q ipc.ObjectPages, _ []byte) (ipc.Reply, error) {
			states := bytes.Repeat([]byte{3 | ipc.PageStored}, int(q.Count))
			return ipc.Reply{Body: ipc.ObjectPagesReply{Offset: q.Offset, Count: q.Count}, Tail: states}, nil
		})
	case ipc.TypeObjects:
		return answer(r, func(q ipc.Objects, _ []byte) (ipc.Reply, error) { // three pages of two
			tail, err := ipc.AppendList(nil, []ipc.ObjectEntry{{ID: q.After + 1, Size: 5, PageSize: 4096}, {ID: q.After + 2, Mappings: 3}})
			more := uint32(0)
			if q.After < 4 {
				more = 1
			}
			return ipc.Reply{Body: ipc.ObjectsReply{More: more}, Tail: tail}, err
		})
	case ipc.TypeInfo:
		f.mu.Lock()
		defer f.mu.Unlock()
		tail, err := ipc.AppendStrings(nil, "memfd", "a fake, as root", "6.18", "v0", "none", "none")
		return ipc.Reply{Body: ipc.InfoReply{MinPageSize: 4096, Tier: 'A', Objects: uint32(len(f.objects)), Mappings: uint32(len(f.mappings)), KernelResident: -1, Budget: f.maps,
			PagerPID: int32(os.Getpid())}, Tail: tail}, err
	}
	return ipc.Reply{}, fmt.Errorf("%v: %w", r.Type, ipc.ErrUnknown)
}

func (f *fake) create(r *ipc.Message, q ipc.ObjectCreate, tail []byte) (ipc.Reply, error) {
	s, err := ipc.DecodeStrings(tail, 2)
	if err != nil {
		return ipc.Reply{}, err
	}
	if s[0] == "full" {
		return ipc.Reply{}, fmt.Errorf("create object: the paging space is full (free some): %w: %w", emm.ResourceShortage, unix.ENOSPC)
	}
	o := &fakeObject{page: max(int64(q.PageSize), 4096), bad: map[int64]bool{}, stuck: map[int64]bool{}, stored: map[int64][]byte{}}
	o.size = (q.Size + o.page - 1) / o.page * o.page
	for _, w := range strings.Split(s[1], ",") {
		if w == "" {
			continue
		}
		n, _ := strconv.ParseInt(w[1:], 10, 64)
		switch w[0] {
		case 'b':
			o.bad[n] = true
		case 's':
			o.stuck[n] = true
		case 'm':
			o.slow = true
		case 'w':
			o.wpd = true
		}
	}
	fd, err := unix.MemfdCreate("object", unix.MFD_CLOEXEC)
	if err != nil {
		return ipc.Reply{}, err
	}
	o.file = os.NewFile(uintptr(fd), "object")
	if err := o.file.Truncate(o.size); err != nil {
		return ipc.Reply{}, err
	}
	if r.Type == ipc.TypeObjectCreate {
		o.port = emm.NewPort()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last++
	f.objects[f.last] = o
	return ipc.Reply{Body: ipc.ObjectReply{Handle: f.last, Size: q.Size, Port: o.port, PageSize: uint32(o.page)}}, nil
}

func (f *fake) open(q ipc.ObjectOpen, _ []byte) (ipc.Reply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, o := range f.objects {
		if o.port == q.Port && !o.port.IsNull() {
			f.last++
			f.objects[f.last] = o
			return ipc.Reply{Body: ipc.ObjectReply{Handle: f.last, Size: o.size, Port: o.port, PageSize: uint32(o.page)}}, nil
		}
	}
	return ipc.Reply{}, fmt.Errorf("open object: no object has this port: %w", emm.InvalidArgument)
}

func (f *fake) mapObject(q ipc.Map, _ []byte) (ipc.Reply, error) {
	f.mu.Lock()
	o := f.objects[q.Handle]
	f.mu.Unlock()
	if o == nil || q.Offset%o.page != 0 || q.Size%o.page != 0 || q.Offset+q.Size > o.size {
		return ipc.Reply{}, fmt.Errorf("map object: bad range %d+%d: %w", q.Offset, q.Size, emm.InvalidArgument)
	}
	if o.slow {
		time.Sleep(300 * time.Millisecond)
	}
	mode := os.O_RDWR
	if q.Flags&ipc.MapReadOnly != 0 {
		mode = os.O_RDONLY
	}
	file, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", o.file.Fd()), mode, 0)
	if err != nil {
		return ipc.Reply{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last++
	f.maps++
	f.mappings[f.last] = &fakeMapping{o: o, offset: q.Offset, size: q.Size, readOnly: mode == os.O_RDONLY}
	reply := ipc.MapReply{Mapping: f.last, FileOffset: q.Offset}
	return ipc.Reply{Body: reply, FDs: []int{int(file.Fd())}, Done: func() { file.Close() }}, nil
}

// populate of a stuck page releases it; of a range of several pages with a stuck one it waits for that.
func (f *fake) populate(ctx context.Context, q ipc.Populate) (ipc.Reply, error) {
	for {
		f.mu.Lock()
		m := f.mappings[q.Mapping]
		if m == nil {
			f.mu.Unlock()
			return ipc.Reply{}, emm.InvalidArgument
		}
		if q.Size == m.o.page {
			n := (m.offset + q.Offset) / m.o.page
			delete(m.o.stuck, n)
			f.uffd.Wake(m.address+uint64(q.Offset), uint64(q.Size))
		}
		wait := false
		for n := range m.o.stuck {
			at := n*m.o.page - m.offset
			wait = wait || at >= q.Offset && at < q.Offset+q.Size
		}
		f.mu.Unlock()
		if !wait {
			return ipc.Reply{}, nil
		}
		select {
		case <-ctx.Done():
			return ipc.Reply{}, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// pageOut protects, stores and punches, in every mapping of the object.
func (f *fake) pageOut(q ipc.PageOut, _ []byte) (ipc.Reply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.mappings[q.Mapping]
	first, size := m.offset+q.Offset, q.Size
	each := func(do func(m *fakeMapping, at uint64) error) error {
		for _, other := range f.mappings {
			if other.o == m.o && other.address != 0 && other.offset <= first && first+size <= other.offset+other.size {
				err := do(other, other.address+uint64(first-other.offset))
				if err != nil && !errors.Is(err, unix.ENOENT) { // ENOENT: its task is taking it away, and has no access any more
					return err
				}
			}
		}
		return nil
	}
	err := each(func(m *fakeMapping, at uint64) error {
		if m.readOnly {
			return nil
		}
		return f.uffd.WriteProtect(at, uint64(size), uffd.WriteProtectWP)
	})
	if err != nil {
		return ipc.Reply{}, err
	}
	for off := first; off < first+size; off += m.o.page {
		if hole, err := unix.Seek(int(m.o.file.Fd()), off, unix.SEEK_HOLE); err != nil || hole == off {
			continue
		}
		b := make([]byte, m.o.page)
		if _, err := m.o.file.ReadAt(b, off); err != nil {
			return ipc.Reply{}, err
		}
		m.o.stored[off/m.o.page] = b
	}
	if err := unix.Fallocate(int(m.o.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, first, size); err != nil {
		return ipc.Reply{}, err
	}
	err = each(func(m *fakeMapping, at uint64) error {
		if !m.readOnly {
			if err := f.uffd.WriteProtect(at, uint64(size), 0); err != nil {
				return err
			}
		}
		return f.uffd.Wake(at, uint64(size))
	})
	return ipc.Reply{}, err
}

// reason tells why a page is bad, and heals it.
func (f *fake) reason(q ipc.FaultReason, _ []byte) (ipc.Reply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.mappings[q.Mapping]
	n := (m.offset + q.Offset) / m.o.page
	if !m.o.bad[n] {
		return ipc.Reply{Body: ipc.FaultReasonReply{}}, nil
	}
	delete(m.o.bad, n)
	return ipc.Reply{Body: ipc.FaultReasonReply{Reason: int32(emm.MemoryError), Errno: int32(unix.EIO)}, Tail: []byte("read page from the fake store")}, nil
}

// read answers the faults of the task.
func (f *fake) read(fd *uffd.FD) {
	msgs := make([]uffd.Msg, 16)
	for {
		p := []unix.PollFd{{Fd: int32(fd.Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && err != unix.EINTR {
			panic(err)
		}
		n, err := fd.Read(msgs)
		if err != nil {
			return
		}
		for i := range msgs[:n] {
			if msgs[i].Event() == uffd.EventPagefault {
				f.fault(fd, msgs[i].Address(), msgs[i].Flags())
			}
		}
	}
}

func (f *fake) fault(fd *uffd.FD, address uint64, flags uffd.FaultFlags) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.mappings {
		if m.address == 0 || address < m.address || address >= m.address+uint64(m.size) {
			continue
		}
		at := (address - m.address) / uint64(m.o.page) * uint64(m.o.page)
		n, dst, size := (m.offset+int64(at))/m.o.page, m.address+at, uint64(m.o.page)
		switch {
		case m.o.stuck[n]:
			return
		case m.o.bad[n]:
			fd.Poison(dst, size, 0)
		case flags&uffd.FaultWP != 0:
			fd.WriteProtect(dst, size, 0)
		case flags&uffd.FaultMinor != 0:
			fd.Continue(dst, size, 0)
		default:
			contents := m.o.stored[n]
			if contents == nil {
				contents = bytes.Repeat([]byte{byte(n + 1)}, int(m.o.page))
			}
			if m.readOnly { // never copy into a private mapping
				if _, err := m.o.file.WriteAt(contents, n*m.o.page); err != nil {
					panic(err)
				}
				fd.Continue(dst, size, 0)
				break
			}
			mode := uffd.CopyMode(0)
			if m.o.wpd {
				mode = uffd.CopyWP
			}
			fd.Copy(dst, contents, mode)
		}
		fd.Wake(dst, size)
		return
	}
}

// pairConn is net.FileConn for the tests' sockets.
func pairConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}
