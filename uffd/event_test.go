//go:build linux

package uffd

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startCall makes a system call that waits for its event to be read.
func startCall(nr uintptr, args ...uint64) *touch {
	var a [6]uintptr
	for i, v := range args {
		a[i] = uintptr(v)
	}
	return start(func(c *touch) {
		if _, _, errno := unix.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
			c.err = errno
		}
	})
}

// TestEventRemove drops pages: the event comes, and the pages are missing again.
func TestEventRemove(t *testing.T) {
	each(t, allKinds, func(t *testing.T, k kind) {
		u := open(t, &OpenOptions{Features: FeatureEventRemove})
		m := k.memory(t)
		register(t, u, m, RegisterMissing)
		if _, err := u.Copy(m.addr, fill(m.size, 1), 0); err != nil {
			t.Fatal(err)
		}
		advice := uint64(unix.MADV_DONTNEED)
		if k.shared {
			advice = unix.MADV_REMOVE // out of the file too
		}
		c := startCall(unix.SYS_MADVISE, m.at(2), 3*m.page, advice)
		msg := nextEvent(t, u, EventRemove)
		if msg.Start() != m.at(2) || msg.End() != m.at(5) {
			t.Errorf("%v; want [%#x, %#x)", msg, m.at(2), m.at(5))
		}
		c.ok(t)
		wantBytes(t, m, 5, fill(m.size, 1)[5*m.page:6*m.page])
		c = startPeek(m.at(3), m.page)
		nextFault(t, u, 0, m.at(3), m.page)
		want := fill(m.page, 3)
		if _, err := u.Copy(m.at(3), want, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(c.ok(t), want) {
			t.Error("wrong contents")
		}
	})
}

// TestEventUnmap unmaps a part.
func TestEventUnmap(t *testing.T) {
	each(t, allKinds, func(t *testing.T, k kind) {
		u := open(t, &OpenOptions{Features: FeatureEventUnmap})
		m := k.memory(t)
		register(t, u, m, RegisterMissing)
		c := startCall(unix.SYS_MUNMAP, m.at(4), 2*m.page)
		msg := nextEvent(t, u, EventUnmap)
		if msg.Start() != m.at(4) || msg.End() != m.at(6) {
			t.Errorf("%v; want [%#x, %#x)", msg, m.at(4), m.at(6))
		}
		c.ok(t)
		done, err := u.Copy(m.at(4), fill(m.page, 1), 0)
		wantDone(t, "copy to unmapped memory", done, err, 0, unix.ENOENT)
		done, err = u.Copy(m.at(3), fill(m.page, 1), 0)
		wantDone(t, "copy beside it", done, err, m.page, nil)

		// The cleaning up unmaps too, and would wait for its event to be read.
		if err := u.Unregister(m.at(0), 4*m.page); err != nil {
			t.Fatal(err)
		}
		if err := u.Unregister(m.at(6), 2*m.page); err != nil {
			t.Fatal(err)
		}
	})
}

// TestEventRemap moves the mapping: its faults come from the new address, and what was protected still is.
func TestEventRemap(t *testing.T) {
	each(t, []kind{anon, memfd, private, tmpfs}, func(t *testing.T, k kind) {
		needWP(t, k)
		u := open(t, &OpenOptions{Features: FeatureEventRemap})
		m, to := k.memory(t), anon.memory(t)
		register(t, u, m, RegisterMissing|RegisterWP)
		want := fill(m.page, 1)
		if _, err := u.Copy(m.at(0), want, CopyWP); err != nil {
			t.Fatal(err)
		}
		c := startCall(unix.SYS_MREMAP, m.addr, m.size, m.size, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to.addr)
		msg := nextEvent(t, u, EventRemap)
		if msg.From() != m.addr || msg.To() != to.addr || msg.Length() != m.size {
			t.Errorf("%v; want %#x+%d to %#x", msg, m.addr, m.size, to.addr)
		}
		c.ok(t)
		wantBytes(t, to, 0, want)
		wantProtected(t, u, to, 0)
		c = startPeek(to.at(1), m.page)
		nextFault(t, u, 0, to.at(1), m.page)
		if _, err := u.Copy(to.at(1), want, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(c.ok(t), want) {
			t.Error("wrong contents")
		}
	})
}

// TestMmapChanging fills while an event is unread: everything fails with EAGAIN and nothing done.
func TestMmapChanging(t *testing.T) {
	need(t, HaveMove())
	need(t, HaveContinueWP())
	each(t, []kind{anon, memfd, tmpfs}, func(t *testing.T, k kind) {
		u := open(t, &OpenOptions{Features: FeatureEventRemove})
		m, src := k.memory(t), anon.memory(t)
		mode := RegisterMissing | RegisterWP
		if k.file != nil {
			mode |= RegisterMinor
		}
		register(t, u, m, mode)
		if _, err := u.Copy(m.at(0), fill(m.page, 1), 0); err != nil {
			t.Fatal(err)
		}
		c := startCall(unix.SYS_MADVISE, m.at(0), m.page, unix.MADV_DONTNEED)
		if !pollIn(u.Fd(), 10*time.Second) {
			t.Fatal("no event")
		}
		for what, call := range map[string]func() (int64, error){
			"copy":          func() (int64, error) { return u.Copy(m.at(1), fill(m.page, 1), 0) },
			"zeropage":      func() (int64, error) { return u.Zeropage(m.at(1), m.page, 0) },
			"continue":      func() (int64, error) { return u.Continue(m.at(1), m.page, 0) },
			"poison":        func() (int64, error) { return u.Poison(m.at(1), m.page, 0) },
			"move":          func() (int64, error) { return u.Move(m.at(1), src.at(1), m.page, 0) },
			"write-protect": func() (int64, error) { return 0, u.WriteProtect(m.at(1), m.page, WriteProtectWP) },
		} {
			done, err := call()
			wantDone(t, what, done, err, 0, unix.EAGAIN)
		}
		nextEvent(t, u, EventRemove)
		c.ok(t)
		done, err := u.Copy(m.at(1), fill(m.page, 1), 0)
		wantDone(t, "copy after the event", done, err, m.page, nil)
	})
}

// TestFaultsBeforeEvents shows the order of read: faults first, although the event is older.
func TestFaultsBeforeEvents(t *testing.T) {
	u := open(t, &OpenOptions{Features: FeatureEventRemove})
	m := anon.memory(t)
	register(t, u, m, RegisterMissing)
	event := startCall(unix.SYS_MADVISE, m.at(0), m.page, unix.MADV_DONTNEED)
	event.waits(t)
	fault := startPeek(m.at(1), 1)
	fault.waits(t)
	msgs := make([]Msg, 4)
	n, err := u.Read(msgs)
	if err != nil || n != 2 || msgs[0].Event() != EventPagefault || msgs[1].Event() != EventRemove {
		t.Fatalf("read %d messages %v, %v; want a fault, then an event", n, msgs[:n], err)
	}
	event.ok(t)
	if _, err := u.Zeropage(m.at(1), m.page, 0); err != nil {
		t.Fatal(err)
	}
	fault.ok(t)
}

// TestEventFork forks a task: the child has a userfaultfd of its own, whose faults are answered apart.
func TestEventFork(t *testing.T) {
	each(t, []kind{anon, private, hugetlbPrivate, memfd}, func(t *testing.T, k kind) {
		c := startTask(t, k, OpenOptions{Features: FeatureEventFork}, RegisterMissing)
		u, m := c.uffd, &c.mem
		if _, err := u.Copy(m.at(0), fill(m.page, 1), 0); err != nil {
			t.Fatal(err)
		}
		c.send(t, "fork", m.at(1))
		c.waits(t) // fork waits for its event to be read
		msg := nextEvent(t, u, EventFork)
		child := FromFd(msg.Fd())
		defer child.Close()
		if fd, err := unix.FcntlInt(uintptr(child.Fd()), unix.F_GETFD, 0); err != nil || fd&unix.FD_CLOEXEC == 0 {
			t.Errorf("the child's userfaultfd: flags %#x, %v; want close-on-exec", fd, err)
		}
		c.reply(t)
		c.send(t, "child")
		nextFault(t, child, 0, m.at(1), m.page)
		want := fill(m.page, 7)
		done, err := child.Copy(m.at(1), want, 0)
		wantDone(t, "copy into the child", done, err, m.page, nil)
		if r := c.reply(t); r.Val != uint64(want[0]) {
			t.Errorf("the child read %d, want %d", r.Val, want[0])
		}
		if k.shared {
			return
		}
		done, err = u.Copy(m.at(1), want, 0) // still missing in the parent
		wantDone(t, "copy into the parent", done, err, m.page, nil)
	})
}

// TestForkWriteProtect looks at the page table of a forked child: protection is inherited only together with the event.
func TestForkWriteProtect(t *testing.T) {
	for _, withEvent := range []bool{false, true} {
		each(t, []kind{anon, memfd, tmpfs, hugetlb}, func(t *testing.T, k kind) {
			needWP(t, k)
			var f Features
			if withEvent {
				f = FeatureEventFork
			}
			c := startTask(t, k, OpenOptions{Features: f}, RegisterMissing|RegisterWP)
			u, m := c.uffd, &c.mem
			if _, err := u.Copy(m.at(0), fill(m.page, 1), CopyWP); err != nil {
				t.Fatal(err)
			}
			c.send(t, "fork", m.at(0))
			if withEvent {
				child := FromFd(nextEvent(t, u, EventFork).Fd())
				defer child.Close()
			}
			pid := int(c.reply(t).Val)
			if !protectedIn(t, c.cmd.Process.Pid, m.at(0)) {
				t.Error("not protected in the parent")
			}
			if got := protectedIn(t, pid, m.at(0)); got != withEvent {
				t.Errorf("protected in the child: %v, want %v", got, withEvent)
			}
			c.send(t, "child")
			c.reply(t)
		})
	}
}

// protectedIn reads the userfaultfd write-protect bit of /proc/PID/pagemap.
func protectedIn(t testing.TB, pid int, addr uint64) bool {
	t.Helper()
	f, err := os.Open(procPath(pid, "pagemap"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var entry [8]byte
	if _, err := f.ReadAt(entry[:], int64(addr/uint64(os.Getpagesize())*8)); err != nil {
		t.Fatal(err)
	}
	return binary.NativeEndian.Uint64(entry[:])>>57&1 != 0
}
