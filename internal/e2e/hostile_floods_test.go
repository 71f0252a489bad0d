package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/uffd"
)

func init() {
	attacks["connections"] = connections
	attacks["objects"] = objectsFlood
	attacks["mappings"] = mappingsFlood
	attacks["slow readers"] = slowReaders
	attacks["descriptors"] = descriptors
	attacks["numbers"] = numbers
	attacks["lies"] = lies
	attacks["in mid-fault"] = midFault
	attacks["closed socket"] = closedSocket
	attacks["stopped"] = stopped
	attacks["inherited"] = inherited
	attacks["wired"] = wired
	attacks["discard under faults"] = discardUnderFaults
}

// connections opens more than the pager allows, and says nothing on them; then some that say Hello.
func connections(v *villain) error {
	var refused bool
	for range 1500 {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: v.socket, Net: "unixpacket"})
		if err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		keep(c)
	}
	for end := time.Now().Add(v.limit); time.Now().Before(end) && !refused; {
		_, err := newVillain(v.socket, uffd.RequiredFeatures)
		refused = errors.Is(err, emm.ResourceShortage) || errors.Is(err, ipc.ErrGone)
	}
	if !refused {
		return errors.New("no connection is refused")
	}
	return nil
}

// kept is what must not be collected.
var kept struct {
	sync.Mutex
	all []any
}

func keep(x any) {
	kept.Lock()
	defer kept.Unlock()
	kept.all = append(kept.all, x)
}

// objectsFlood makes objects until there is no more room.
func objectsFlood(v *villain) error {
	for i := 0; ; i++ {
		_, err := v.object(1 << 30)
		if errors.Is(err, emm.ResourceShortage) {
			v.say(fmt.Sprintf("%d objects: %v", i, err))
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// mappingsFlood maps one object until there is no more room, never starts, and starts, some.
func mappingsFlood(v *villain) error {
	h, err := v.object(1 << 20)
	if err != nil {
		return err
	}
	i := 0
	for end := time.Now().Add(v.limit); time.Now().Before(end); i++ {
		m, err := v.call(ipc.TypeMap, ipc.Map{Handle: h, Size: 4096})
		if errors.Is(err, emm.ResourceShortage) {
			break
		}
		if err != nil {
			return err
		}
		m.Close()
	}
	v.say(fmt.Sprintf("%d mappings", i))
	return nil
}

// slowReaders ask for large replies and do not read them.
func slowReaders(v *villain) error {
	for range 50 {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: v.socket, Net: "unixpacket"})
		if err != nil {
			return err
		}
		keep(c)
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		c.Write(good(ipc.TypeHello, ipc.Hello{}, 0))
		body, _ := ipc.AppendFixed(nil, ipc.ObjectCreate{Size: 1 << 30})
		tail, _ := ipc.AppendStrings(nil, "", "")
		body = append(body, tail...)
		c.Write(frame(ipc.Version, ipc.TypeObjectCreate, 8, uint32(len(body)), 0, 0, body))
		for i := range uint32(1000) {
			typ, q := ipc.TypeObjectPages, any(ipc.ObjectPages{Handle: 1, Count: ipc.MaxPages})
			if i%2 == 0 {
				typ, q = ipc.TypeObjects, ipc.Objects{}
			}
			body, _ := ipc.AppendFixed(nil, q)
			if _, err := c.Write(frame(ipc.Version, typ, 100+i, uint32(len(body)), 0, 0, body)); err != nil {
				break
			}
		}
	}
	return nil
}

// descriptors sends as many file descriptors as a packet can carry, in every frame.
func descriptors(v *villain) error {
	fds := make([]int, 253)
	for i := range fds {
		fds[i] = v.fd.Fd()
	}
	oob := unix.UnixRights(fds...)
	for end := time.Now().Add(v.limit); time.Now().Before(end); {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: v.socket, Net: "unixpacket"})
		if err != nil {
			return err
		}
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		for range 200 {
			if _, _, err := c.WriteMsgUnix(good(ipc.TypeInfo, ipc.Empty{}, 1), oob, nil); err != nil {
				break
			}
		}
		c.Close()
	}
	return nil
}

// numbers tries every number that could overflow something in every request, some of them cancelled at once.
func numbers(v *villain) error {
	m, err := v.mapObject(1 << 20)
	if err != nil {
		return err
	}
	other, err := v.object(1 << 20)
	if err != nil {
		return err
	}
	big := []int64{math.MinInt64, math.MinInt64 + 4096, -1 << 47, -4096, -1, 0, 1, 4096, 1 << 20, 1<<20 + 4096, 1 << 46, 1 << 47, 1 << 62, math.MaxInt64 &^ 4095, math.MaxInt64}
	var bodies []struct {
		typ  ipc.Type
		body any
	}
	add := func(typ ipc.Type, body any) {
		bodies = append(bodies, struct {
			typ  ipc.Type
			body any
		}{typ, body})
	}
	for _, a := range big {
		add(ipc.TypeObjectSetSize, ipc.ObjectSetSize{Handle: other, Size: a})
		add(ipc.TypeFaultReason, ipc.FaultReason{Mapping: m.id, Offset: a})
		add(ipc.TypeObjectPages, ipc.ObjectPages{Handle: m.handle, Offset: a, Count: ipc.MaxPages})
		add(ipc.TypeObjectPages, ipc.ObjectPages{Handle: m.handle, Offset: a, Count: math.MaxUint32})
		add(ipc.TypeObjects, ipc.Objects{After: uint64(a)})
		add(ipc.TypeMapReady, ipc.MapReady{Mapping: m.id, Address: uint64(a)})
		add(ipc.TypeRegionStats, ipc.RegionStats{Mapping: uint64(a)})
		for _, b := range big {
			add(ipc.TypePopulate, ipc.Populate{Mapping: m.id, Offset: a, Size: b, Flags: ipc.PopulateWrite})
			add(ipc.TypePageOut, ipc.PageOut{Mapping: m.id, Offset: a, Size: b})
			add(ipc.TypeSync, ipc.Sync{Mapping: m.id, Offset: a, Size: b})
			add(ipc.TypeWire, ipc.Wire{Mapping: m.id, Offset: a, Size: b})
			add(ipc.TypeUnwire, ipc.Unwire{Mapping: m.id, Offset: a, Size: b})
			add(ipc.TypeDiscard, ipc.Discard{Mapping: m.id, Offset: a, Size: b})
			add(ipc.TypeAdvise, ipc.Advise{Mapping: m.id, Offset: a, Size: b, Advice: uint32(b) % 8})
			add(ipc.TypeMap, ipc.Map{Handle: other, Offset: a, Size: b})
			add(ipc.TypeObjectCreate, ipc.ObjectCreate{Size: a, ClusterSize: b})
		}
	}
	for i, q := range bodies {
		if i%3 == 0 {
			ctx, cancel := context.WithCancel(context.Background())
			time.AfterFunc(time.Duration(i%7)*10*time.Microsecond, cancel)
			o := &ipc.CallOptions{}
			if q.typ == ipc.TypeObjectCreate {
				o.Tail, _ = ipc.AppendStrings(nil, "", "")
			}
			if r, err := v.l.Call(ctx, q.typ, q.body, o); err == nil {
				r.Close()
			}
			cancel()
		} else if err := v.answered(q.typ, q.body); err != nil {
			return err
		}
	}
	return nil
}

// lies hands over userfaultfds that are not what is said of them, twice the same, and claims memory in strange orders.
func lies(v *villain) error {
	for _, f := range []uffd.Features{0, uffd.FeatureEventRemap, uffd.RequiredFeatures | uffd.FeatureEventRemove, uffd.RequiredFeatures | uffd.FeatureEventUnmap,
		uffd.RequiredFeatures | uffd.FeatureSigbus, uffd.RequiredFeatures | uffd.FeatureEventFork, uffd.RequiredFeatures | uffd.FeatureWPAsync} {
		if w, err := newVillain(v.socket, f); !errors.Is(err, emm.InvalidArgument) {
			return fmt.Errorf("a userfaultfd with %v that is said to have %v: %v", f, uffd.RequiredFeatures, err)
		} else if w != nil {
			w.l.Close()
		}
	}
	h, err := v.object(1 << 20)
	if err != nil {
		return err
	}
	p, err := v.prepare(h, 1<<20)
	if err != nil {
		return err
	}
	if err := v.do(ipc.TypePopulate, ipc.Populate{Mapping: p.id, Size: 4096}); err == nil {
		v.say("populated before it is ready")
	}
	q, err := v.prepare(h, 1<<20)
	if err != nil {
		return err
	}
	if err := v.do(ipc.TypeMapReady, ipc.MapReady{Mapping: p.id, Address: p.addr}); err != nil {
		return err
	}
	for _, at := range []uint64{p.addr, p.addr - 4096, p.addr + 4096, q.addr + 4096} {
		if err := v.do(ipc.TypeMapReady, ipc.MapReady{Mapping: q.id, Address: at}); err == nil {
			return fmt.Errorf("a mapping at %#x, beside one at %#x", at, p.addr)
		}
	}
	for range 2 {
		v.do(ipc.TypeUnmap, ipc.Unmap{Mapping: q.id})
		v.do(ipc.TypeObjectClose, ipc.ObjectClose{Handle: h})
	}
	// A second connection with the same userfaultfd: two readers.
	conn, err := ipc.DialConn(context.Background(), v.socket)
	if err != nil {
		return err
	}
	w := &villain{socket: v.socket, l: ipc.NewLink(conn, nil), fd: v.fd}
	if err := w.do(ipc.TypeHello, ipc.Hello{}); err != nil {
		return err
	}
	w.do(ipc.TypeTaskUffd, ipc.TaskUffd{Features: uint64(uffd.RequiredFeatures)}, v.fd.Fd())
	for i := range 256 {
		try(func() { p.bytes()[i*4096] = 1 })
	}
	keep(w)
	return nil
}

// midFault takes memory away while its threads fault.
func midFault(v *villain) error {
	const size = 1 << 20
	end := time.Now().Add(v.limit)
	for time.Now().Before(end) {
		m, err := v.mapObject(size)
		if err != nil {
			return err
		}
		for i := range int64(8) {
			go func() {
				for p := i * 4096; p < size; p += 8 * 4096 {
					try(func() { m.bytes()[p]++ })
				}
			}()
		}
		go v.do(ipc.TypePageOut, ipc.PageOut{Mapping: m.id, Size: size})
		go v.do(ipc.TypeDiscard, ipc.Discard{Mapping: m.id, Size: size})
		time.Sleep(time.Duration(time.Now().UnixNano() % 500_000))
		v.fd.Unregister(m.addr+size/4, size/4)
		unix.MmapPtr(-1, 0, pointer(m.addr), size/4, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
		room, err := mmap(-1, size/4, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		unix.Syscall6(unix.SYS_MREMAP, uintptr(m.addr+size/2), size/4, size/4, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uintptr(room), 0)
		unix.Madvise(m.bytes()[size*3/4:], unix.MADV_REMOVE)
		if err := v.do(ipc.TypeUnmap, ipc.Unmap{Mapping: m.id}); err != nil {
			return err
		}
		if err := v.do(ipc.TypeObjectClose, ipc.ObjectClose{Handle: m.handle}); err != nil {
			return err
		}
		// Whoever still waits there waits for the villain's own userfaultfd.
		v.fd.Unregister(room, size/4)
		v.fd.Unregister(m.addr+size*3/4, size/4)
		unix.Close(m.file)
	}
	return nil
}

// closedSocket leaves the pager again and again while threads fault, and lives on.
func closedSocket(v *villain) error {
	end := time.Now().Add(v.limit)
	for i := 0; i < 100 && time.Now().Before(end); i++ {
		w, err := newVillain(v.socket, uffd.RequiredFeatures)
		if err != nil {
			return err
		}
		m, err := w.mapObject(1 << 20)
		if err != nil {
			return err
		}
		for i := range int64(8) {
			go func() {
				for {
					for p := i * 4096; p < m.size; p += 8 * 4096 {
						try(func() { m.bytes()[p]++ })
					}
					time.Sleep(10 * time.Millisecond)
				}
			}()
		}
		time.Sleep(time.Millisecond)
		w.l.Close()
		if i%2 == 0 {
			w.fd.Close()
		}
	}
	return nil
}

// stopped is stopped with memory that is dirty, in mid-fault.
func stopped(v *villain) error {
	m, err := v.mapObject(8 << 20)
	if err != nil {
		return err
	}
	go func() {
		for {
			m.write()
			v.do(ipc.TypePageOut, ipc.PageOut{Mapping: m.id, Size: m.size})
		}
	}()
	for range 3 {
		out, err := exec.Command("/bin/sh", "-c", "kill -STOP "+strconv.Itoa(os.Getpid())+"; sleep 0.5; kill -CONT "+strconv.Itoa(os.Getpid())).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	return nil
}

// inherited leaves a child that has its userfaultfd and its file, and that outlives the villain a little.
func inherited(v *villain) error {
	m, err := v.mapObject(8 << 20)
	if err != nil {
		return err
	}
	m.write()
	cmd := exec.Command("/bin/sleep", "2")
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(v.fd.Fd()), "userfaultfd"), os.NewFile(uintptr(m.file), "frames")}
	return cmd.Start()
}

// wired wires all that can be wired.
func wired(v *villain) error {
	m, err := v.mapObject(64 << 20)
	if err != nil {
		return err
	}
	for n := int64(32 << 20); n >= 4096; n /= 2 {
		for off := int64(0); off+n <= m.size; off += n {
			if v.do(ipc.TypeWire, ipc.Wire{Mapping: m.id, Offset: off, Size: n}) != nil {
				break
			}
		}
	}
	return nil
}

// discardUnderFaults throws away, and pages out, what other threads of it are touching, and makes the object shorter and longer.
func discardUnderFaults(v *villain) error {
	m, err := v.mapObject(4 << 20)
	if err != nil {
		return err
	}
	end := time.Now().Add(v.limit)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for time.Now().Before(end) {
				for p := int64(0); p < m.size; p += 4096 {
					try(func() { m.bytes()[p]++ })
				}
			}
		})
	}
	for _, f := range []func() error{
		func() error { return v.answered(ipc.TypeDiscard, ipc.Discard{Mapping: m.id, Size: m.size}) },
		func() error { return v.answered(ipc.TypePageOut, ipc.PageOut{Mapping: m.id, Size: m.size}) },
		func() error {
			return v.answered(ipc.TypeObjectSetSize, ipc.ObjectSetSize{Handle: m.handle, Size: 4096})
		},
		func() error {
			return v.answered(ipc.TypeObjectSetSize, ipc.ObjectSetSize{Handle: m.handle, Size: m.size})
		},
		func() error {
			r, err := v.call(ipc.TypeObjectSnapshot, ipc.ObjectSnapshot{Handle: m.handle})
			if err != nil {
				return nil
			}
			defer r.Close()
			o, _, err := ipc.Decode[ipc.ObjectReply](bytes.Clone(r.Body))
			if err != nil {
				return err
			}
			return v.answered(ipc.TypeObjectClose, ipc.ObjectClose{Handle: o.Handle})
		},
	} {
		wg.Go(func() {
			for time.Now().Before(end) {
				if err := f(); err != nil {
					v.say(err.Error())
					os.Exit(1)
				}
			}
		})
	}
	wg.Wait()
	return nil
}
