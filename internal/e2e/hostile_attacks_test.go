package e2e

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
)

func init() {
	attacks["huge object"] = hugeObject
	attacks["huge discard"] = hugeDiscard
	attacks["orphan file"] = orphanFile
	attacks["truncate dirty"] = truncateDirty
	attacks["longer file"] = longerFile
	attacks["event storm"] = eventStorm
	attacks["blocking"] = blocking
}

// try runs f, which may end in SIGBUS.
func try(f func()) (ok bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { recover() }()
	f()
	return true
}

// hugeObject asks for everything that can be asked for 2 TiB at once.
func hugeObject(v *villain) error {
	const size = 1 << 41
	h, err := v.object(size)
	if err != nil {
		v.say(err.Error())
		return nil // it need not be allowed
	}
	m, err := v.call(ipc.TypeMap, ipc.Map{Handle: h, Size: size})
	if err != nil {
		v.say(err.Error())
		return nil
	}
	defer m.Close()
	r, _, err := ipc.Decode[ipc.MapReply](m.Body)
	if err != nil {
		return err
	}
	id := r.Mapping
	for _, q := range []struct {
		typ  ipc.Type
		body any
	}{
		{ipc.TypeWire, ipc.Wire{Mapping: id, Size: 4096}},
		{ipc.TypeUnwire, ipc.Unwire{Mapping: id, Size: size}},
		{ipc.TypePageOut, ipc.PageOut{Mapping: id, Size: size}},
		{ipc.TypeSync, ipc.Sync{Mapping: id, Size: size}},
		{ipc.TypeAdvise, ipc.Advise{Mapping: id, Size: size, Advice: 4}},
		{ipc.TypeAdvise, ipc.Advise{Mapping: id, Size: size, Advice: 5}},
		{ipc.TypeRegionStats, ipc.RegionStats{Mapping: id}},
		{ipc.TypeObjects, ipc.Objects{}},
		{ipc.TypeObjectSnapshot, ipc.ObjectSnapshot{Handle: h}},
		{ipc.TypeUnmap, ipc.Unmap{Mapping: id}},
		{ipc.TypeObjectClose, ipc.ObjectClose{Handle: h}},
	} {
		start := time.Now()
		if err := v.answered(q.typ, q.body); err != nil {
			return err
		}
		if d := time.Since(start); d > 500*time.Millisecond {
			v.say(fmt.Sprintf("%v %+v took %v", q.typ, q.body, d))
		}
	}
	return nil
}

// hugeDiscard throws away 2 TiB, of which nothing was ever touched: that takes no time.
func hugeDiscard(v *villain) error {
	const size = 1 << 41
	h, err := v.object(size)
	if err != nil {
		return err
	}
	m, err := v.prepare(h, size)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	if _, err := v.l.Call(ctx, ipc.TypeDiscard, ipc.Discard{Mapping: m.id, Size: size}, nil); err != nil {
		return fmt.Errorf("discard 2 TiB: %w", err)
	}
	for end := time.Now().Add(v.limit); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err := v.do(ipc.TypeUnmap, ipc.Unmap{Mapping: m.id}); err == nil {
			break
		}
	}
	return v.do(ipc.TypeObjectClose, ipc.ObjectClose{Handle: h})
}

// orphanFile keeps the file of an object that has ended, and fills it.
func orphanFile(v *villain) error {
	const size = 64 << 20
	m, err := v.mapObject(size)
	if err != nil {
		return err
	}
	if err := v.do(ipc.TypeUnmap, ipc.Unmap{Mapping: m.id}); err != nil {
		return err
	}
	if err := v.do(ipc.TypeObjectClose, ipc.ObjectClose{Handle: m.handle}); err != nil {
		return err
	}
	return v.allocate(m.file, 0, size)
}

// allocate takes frames by its own hand, again and again.
func (v *villain) allocate(file int, off, size int64) error {
	for end := time.Now().Add(v.limit); time.Now().Before(end); {
		for at := int64(0); at < size; at += 1 << 20 {
			if err := unix.Fallocate(file, 0, off+at, 1<<20); err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("fallocate: %w", err)
			}
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// longerFile makes an object's file longer, and fills what is beyond the object.
func longerFile(v *villain) error {
	m, err := v.mapObject(1 << 20)
	if err != nil {
		return err
	}
	return v.allocate(m.file, 1<<20, 64<<20)
}

// truncateDirty makes pages dirty and takes the file away from under them, so that they cannot be read when they are to be stored.
func truncateDirty(v *villain) error {
	const size = 64 << 20 // more than fits
	m, err := v.mapObject(size)
	if err != nil {
		return err
	}
	for end := time.Now().Add(v.limit); time.Now().Before(end); {
		unix.Ftruncate(m.file, size)
		for i := int64(0); i < size; i += 4096 {
			try(func() { m.bytes()[i] = 1 })
		}
		if err := unix.Ftruncate(m.file, 4096); err != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil
}

// eventStorm moves memory about without end, so that there is always an event unread, while its pages are to be evicted.
func eventStorm(v *villain) error {
	const size = 8 << 20
	m, err := v.mapObject(size)
	if err != nil {
		return err
	}
	end := time.Now().Add(v.limit)
	for t := range 16 {
		// A few pages each, moved to and fro over a reservation of their own.
		from := m.addr + uint64(t)*4*4096
		room, err := mmap(-1, 8*4096, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		go func() {
			for time.Now().Before(end) {
				if _, _, e := unix.Syscall6(unix.SYS_MREMAP, uintptr(from), 4096, 4096, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uintptr(room), 0); e != 0 {
					return
				}
				// What was moved away is reserved again before it is moved back over: the runtime may have put something of its own there.
				const reserve = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED_NOREPLACE
				if _, _, e := unix.Syscall6(unix.SYS_MMAP, uintptr(from), 4096, unix.PROT_NONE, reserve, ^uintptr(0), 0); e != 0 {
					return
				}
				from, room = room, from
			}
		}()
	}
	for time.Now().Before(end) {
		for i := int64(1 << 20); i < size && time.Now().Before(end); i += 4096 {
			try(func() { m.bytes()[i]++ })
		}
	}
	return nil
}

// blocking makes the userfaultfd blocking again and again, and takes the messages away, so that whoever looked before reads waits for ever. At the end the
// connection is closed: then the pager must give up the reader.
func blocking(v *villain) error {
	const size = 8 << 20
	m, err := v.mapObject(size)
	if err != nil {
		return err
	}
	end := time.Now().Add(v.limit)
	fd := v.fd.Fd()
	for range 2 {
		go func() {
			var b [64 * 32]byte
			for {
				unix.SetNonblock(fd, false)
				p := [...]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
				unix.SetNonblock(fd, true)
				unix.Poll(p[:], 0)
				if p[0].Revents&unix.POLLIN != 0 {
					unix.SetNonblock(fd, true)
					unix.Read(fd, b[:])
				}
				unix.SetNonblock(fd, false)
			}
		}()
	}
	for i := range int64(64) {
		go func() {
			for p := i * 4096; p < size; p += 64 * 4096 {
				try(func() { m.bytes()[p] = 1 })
			}
		}()
	}
	time.Sleep(time.Until(end))
	unix.SetNonblock(fd, false)
	return v.l.Close()
}
