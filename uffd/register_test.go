//go:build linux

package uffd

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestRegisterIoctls registers every kind of memory in every mode and looks at the ioctls the kernel offers for it.
func TestRegisterIoctls(t *testing.T) {
	need(t, HaveMove())
	each(t, allKinds, func(t *testing.T, k kind) {
		u := open(t, nil)
		m := k.memory(t)
		for mode := RegisterMode(0); mode <= RegisterMissing|RegisterWP|RegisterMinor; mode++ {
			got, err := u.Register(m.addr, m.size, mode)
			if mode == 0 || mode&RegisterMinor != 0 && k.file == nil {
				wantErr(t, "register", err, unix.EINVAL)
				continue
			}
			if err != nil {
				t.Fatalf("mode %d: %v", mode, err)
			}
			want := IoctlWake | IoctlCopy | IoctlPoison
			if !k.hugetlb {
				want |= IoctlZeropage | IoctlMove // told of shared memory as well, where they fail or allocate
			}
			if mode&RegisterWP != 0 {
				want |= IoctlWriteProtect
			}
			if mode&RegisterMinor != 0 {
				want |= IoctlContinue
			}
			if got != want {
				t.Errorf("mode %d: ioctls %#x, want %#x", mode, got, want)
			}
			if err := u.Unregister(m.addr, m.size); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestRegisterErrors(t *testing.T) {
	u, v := open(t, nil), open(t, nil)
	m := memfd.memory(t)
	_, err := u.Register(m.addr, m.size, 1<<20)
	wantErr(t, "an unknown mode", err, unix.EINVAL)
	_, err = u.Register(m.addr+1, m.size, RegisterMissing)
	wantErr(t, "not whole pages", err, unix.EINVAL)
	_, err = u.Register(m.addr, 0, RegisterMissing)
	wantErr(t, "an empty range", err, unix.EINVAL)
	_, err = u.Register(1<<40, m.page, RegisterMissing)
	wantErr(t, "nothing mapped", err, unix.EINVAL)
	register(t, u, m, RegisterMissing)
	_, err = v.Register(m.addr, m.size, RegisterMissing)
	wantErr(t, "registered elsewhere", err, unix.EBUSY)
	wantErr(t, "unregister nothing", u.Unregister(1<<40, m.page), unix.EINVAL)
	wantErr(t, "wake part of a page", u.Wake(m.addr+1, m.page), unix.EINVAL)
}

// TestRegisterReadOnly registers a file opened read-only, mapped private: what a task does that may only read an object.
func TestRegisterReadOnly(t *testing.T) {
	need(t, HaveMinorShmem())
	u := open(t, nil)
	m := memfd.memory(t)
	alias := m.alias(t)
	want := fill(m.page, 1)
	copy(alias, want)
	fd, err := unix.Open(fdPath(m.file), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	mem, err := unix.Mmap(fd, 0, int(m.size), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	ro := &memory{addr: address(mem), size: m.size, page: m.page, file: -1}
	register(t, u, ro, RegisterMissing|RegisterMinor)
	c := startPeek(ro.at(0), m.page)
	nextFault(t, u, FaultMinor, ro.at(0), m.page)
	done, err := u.Continue(ro.at(0), m.page, 0)
	wantDone(t, "continue", done, err, m.page, nil)
	if got := c.ok(t); got[100] != want[100] {
		t.Errorf("read %d, want %d", got[100], want[100])
	}
	alias[100] = 99 // the shared page itself
	if b, err := peek(ro.at(0)+100, 1); err != nil || b[0] != 99 {
		t.Errorf("read %d, %v after a write through another mapping", b[0], err)
	}
}

// TestUnregister wakes who waits, and leaves zeros.
func TestUnregister(t *testing.T) {
	each(t, allKinds, func(t *testing.T, k kind) {
		u := open(t, nil)
		m := k.memory(t)
		register(t, u, m, RegisterMissing)
		c := startPeek(m.at(1), m.page)
		nextFault(t, u, 0, m.at(1), m.page)
		c.waits(t)
		if err := u.Unregister(m.addr, m.size); err != nil {
			t.Fatal(err)
		}
		for _, b := range c.ok(t) {
			if b != 0 {
				t.Fatal("not zeros")
			}
		}
	})
}
