//go:build linux

package uffd

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

func needWP(t *testing.T, k kind) {
	t.Helper()
	need(t, HaveWriteProtect())
	if k.file != nil {
		need(t, HaveWriteProtectShmem())
	}
}

// wantProtected writes to page i, which must be a write-protect fault, and takes the protection away.
func wantProtected(t testing.TB, u *FD, m *memory, i int) {
	t.Helper()
	c := startPoke(m.at(i)+8, []byte{0xee})
	nextFault(t, u, FaultWrite|FaultWP, m.at(i), m.page)
	c.waits(t)
	if err := u.WriteProtect(m.at(i), m.page, 0); err != nil {
		t.Fatal(err)
	}
	c.ok(t)
	if b, err := peek(m.at(i)+8, 1); err != nil || b[0] != 0xee {
		t.Fatalf("page %d after the write: %x, %v", i, b, err)
	}
}

// TestWriteProtect protects present pages, and pages as Copy brings them.
func TestWriteProtect(t *testing.T) {
	each(t, allKinds, func(t *testing.T, k kind) {
		needWP(t, k)
		u := open(t, nil)
		m := k.memory(t)
		register(t, u, m, RegisterMissing|RegisterWP)
		want := fill(m.size, 1)
		done, err := u.Copy(m.addr, want[:4*m.page], 0)
		wantDone(t, "copy", done, err, 4*m.page, nil)
		done, err = u.Copy(m.at(4), want[4*m.page:], CopyWP)
		wantDone(t, "copy write-protected", done, err, 4*m.page, nil)

		if err := poke(m.at(0), want[:1]); err != nil { // not protected
			t.Error(err)
		}
		if err := u.WriteProtect(m.at(0), 2*m.page, WriteProtectWP); err != nil {
			t.Fatal(err)
		}
		for i := range pages { // reading goes on
			wantBytes(t, m, i, want[uint64(i)*m.page:][:m.page])
		}
		wantProtected(t, u, m, 1)
		wantProtected(t, u, m, 4)
		wantProtected(t, u, m, 7)
		if err := poke(m.at(2), []byte{1}); err != nil {
			t.Error(err)
		}

		// Un-protect without waking.
		c := startPoke(m.at(0), []byte{9})
		nextFault(t, u, FaultWrite|FaultWP, m.at(0), m.page)
		if err := u.WriteProtect(m.at(0), m.page, WriteProtectDontWake); err != nil {
			t.Fatal(err)
		}
		c.waits(t)
		if err := u.Wake(m.at(0), m.page); err != nil {
			t.Fatal(err)
		}
		c.ok(t)

		wantErr(t, "protect without waking", u.WriteProtect(m.at(0), m.page, WriteProtectWP|WriteProtectDontWake), unix.EINVAL)
		wantErr(t, "an unknown mode", u.WriteProtect(m.at(0), m.page, 1<<20), unix.EINVAL)
		wantErr(t, "nothing registered", u.WriteProtect(1<<40, m.page, WriteProtectWP), unix.ENOENT)
	})
}

// TestWriteProtectUnregisteredMode protects memory that is not registered for it.
func TestWriteProtectUnregisteredMode(t *testing.T) {
	u := open(t, nil)
	m := memfd.memory(t)
	register(t, u, m, RegisterMissing)
	wantErr(t, "write-protect", u.WriteProtect(m.addr, m.size, WriteProtectWP), unix.ENOENT)
}

// TestWriteProtectStops meets a mapping that is not registered: what lies before is protected, what lies behind is not. A gap is no obstacle.
func TestWriteProtectStops(t *testing.T) {
	needWP(t, memfd)
	u := open(t, nil)
	m := memfd.memory(t)
	register(t, u, m, RegisterMissing|RegisterWP)
	if _, err := u.Copy(m.addr, fill(m.size, 1), 0); err != nil {
		t.Fatal(err)
	}
	if errno := munmap(m.at(1), m.page); errno != 0 {
		t.Fatal(errno)
	}
	if _, _, errno := unix.Syscall6(unix.SYS_MMAP, uintptr(m.at(4)), uintptr(m.page), unix.PROT_READ,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED, ^uintptr(0), 0); errno != 0 {
		t.Fatal(errno)
	}
	wantErr(t, "write-protect over a foreign mapping", u.WriteProtect(m.addr, m.size, WriteProtectWP), unix.ENOENT)
	if err := poke(m.at(5), []byte{1}); err != nil {
		t.Errorf("behind the foreign mapping: %v", err)
	}
	wantProtected(t, u, m, 0)
	wantProtected(t, u, m, 3)
	if err := u.WriteProtect(m.at(0), 4*m.page, WriteProtectWP); err != nil {
		t.Errorf("write-protect over a gap: %v", err)
	}
	wantProtected(t, u, m, 2)
}

// TestWriteProtectUnpopulated protects absent pages: on shared memory always, on anonymous memory with the feature.
func TestWriteProtectUnpopulated(t *testing.T) {
	need(t, HaveWPUnpopulated())
	for _, f := range []Features{0, FeatureWPUnpopulated} {
		each(t, []kind{anon, memfd, tmpfs}, func(t *testing.T, k kind) {
			needWP(t, k)
			u := open(t, &OpenOptions{Features: f})
			m := k.memory(t)
			register(t, u, m, RegisterWP)
			if err := u.WriteProtect(m.addr, m.size, WriteProtectWP); err != nil {
				t.Fatal(err)
			}
			if f == 0 && k.file == nil {
				if err := poke(m.at(0), []byte{1}); err != nil {
					t.Error(err)
				}
				return
			}
			if f != 0 {
				if _, err := peek(m.at(1), 1); err != nil { // a read brings the page in, still protected
					t.Fatal(err)
				}
				wantProtected(t, u, m, 1)
			}
			wantProtected(t, u, m, 0)
			if errno := madvise(m.at(2), m.page, unix.MADV_DONTNEED); errno != 0 {
				t.Fatal(errno)
			}
			if k.file != nil {
				wantProtected(t, u, m, 2) // a marker survives on shared memory
			} else if err := poke(m.at(2), []byte{1}); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSigbus replaces messages by signals.
func TestSigbus(t *testing.T) {
	need(t, HaveSigbus())
	each(t, allKinds, func(t *testing.T, k kind) {
		needWP(t, k)
		u := open(t, &OpenOptions{Features: FeatureSigbus})
		m := k.memory(t)
		register(t, u, m, RegisterMissing|RegisterWP)
		if _, sigbus := load(m.at(0)); !sigbus {
			t.Error("a load from a missing page went through")
		}
		if !store(m.at(0), 1) {
			t.Error("a store to a missing page went through")
		}
		if _, err := peek(m.at(0), 1); err != unix.EFAULT {
			t.Errorf("a system call on a missing page: %v", err)
		}
		want := fill(m.page, 1)
		if _, err := u.Copy(m.at(0), want, CopyWP); err != nil {
			t.Fatal(err)
		}
		if b, sigbus := load(m.at(0)); b != want[0] || sigbus {
			t.Errorf("loaded %d, %v", b, sigbus)
		}
		if !store(m.at(0), 9) {
			t.Error("a store to a protected page went through")
		}
		if err := u.WriteProtect(m.at(0), m.page, 0); err != nil {
			t.Fatal(err)
		}
		if store(m.at(0), 9) {
			t.Error("SIGBUS without protection")
		}
		if pollIn(u.Fd(), 0) {
			t.Error("a message in spite of SIGBUS")
		}
	})
}

// TestPoison makes pages fail until they are filled or dropped.
func TestPoison(t *testing.T) {
	need(t, HavePoison())
	each(t, allKinds, func(t *testing.T, k kind) {
		u := open(t, nil)
		m := k.memory(t)
		register(t, u, m, RegisterMissing)
		c := startPeek(m.at(0), m.page)
		nextFault(t, u, 0, m.at(0), m.page)
		done, err := u.Poison(m.at(0), 2*m.page, PoisonDontWake)
		wantDone(t, "poison", done, err, 2*m.page, nil)
		c.waits(t)
		if err := u.Wake(m.at(0), m.page); err != nil {
			t.Fatal(err)
		}
		if _, err := c.wait(t); err != unix.EFAULT {
			t.Errorf("a system call on a poisoned page: %v", err)
		}
		if _, sigbus := load(m.at(1)); !sigbus {
			t.Error("a load from a poisoned page went through")
		}
		done, err = u.Poison(m.at(0), m.page, 0)
		wantDone(t, "poison again", done, err, 0, unix.EEXIST)
		if _, err := u.Copy(m.at(4), fill(m.page, 4), 0); err != nil {
			t.Fatal(err)
		}
		done, err = u.Poison(m.at(2), m.size-2*m.page, 0)
		wantDone(t, "poison up to a page that is there", done, err, 2*m.page, unix.EAGAIN)
		wantBytes(t, m, 4, fill(m.page, 4))
		done, err = u.Poison(m.at(5), m.page, 1<<20)
		wantDone(t, "an unknown mode", done, err, 0, unix.EINVAL)

		// The marker is dropped, and the next touch asks again.
		if errno := madvise(m.at(0), m.page, unix.MADV_DONTNEED); errno != 0 {
			t.Fatal(errno)
		}
		c = startPeek(m.at(0), m.page)
		nextFault(t, u, 0, m.at(0), m.page)
		want := fill(m.page, 1)
		if _, err := u.Copy(m.at(0), want, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(c.ok(t), want) {
			t.Error("wrong contents")
		}
		done, err = u.Copy(m.at(1), want, 0) // heals without asking the owner
		wantDone(t, "copy over poison", done, err, m.page, nil)
		wantBytes(t, m, 1, want)
	})
}

// TestPoisonSurvives closes the userfaultfd.
func TestPoisonSurvives(t *testing.T) {
	need(t, HavePoison())
	u := open(t, nil)
	m := memfd.memory(t)
	register(t, u, m, RegisterMissing)
	if _, err := u.Poison(m.addr, m.page, 0); err != nil {
		t.Fatal(err)
	}
	u.Close()
	if _, sigbus := load(m.addr); !sigbus {
		t.Error("poison went with the userfaultfd")
	}
}
