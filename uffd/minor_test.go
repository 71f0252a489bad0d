//go:build linux

package uffd

import (
	"bytes"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// minorKinds are those whose pages can be in a file without being mapped.
var minorKinds = []kind{memfd, tmpfs, hugetlb}

func needMinor(t *testing.T, k kind) {
	t.Helper()
	if k.hugetlb {
		need(t, HaveMinorHugetlb())
	} else {
		need(t, HaveMinorShmem())
	}
}

// TestMinor fills the file through another mapping, touches, and lets the kernel map what is there.
func TestMinor(t *testing.T) {
	each(t, minorKinds, func(t *testing.T, k kind) {
		needMinor(t, k)
		u := open(t, nil)
		m := k.memory(t)
		alias := m.alias(t)
		copy(alias, fill(m.size, 1))
		register(t, u, m, RegisterMinor)

		c := startPeek(m.at(0), m.page)
		nextFault(t, u, FaultMinor, m.at(0), m.page)
		alias[10] = 99 // the handler may still change the page
		done, err := u.Continue(m.at(0), m.page, 0)
		wantDone(t, "continue", done, err, m.page, nil)
		if !bytes.Equal(c.ok(t), alias[:m.page]) {
			t.Error("wrong contents")
		}

		c = startPoke(m.at(1), []byte{42})
		nextFault(t, u, FaultMinor|FaultWrite, m.at(1), m.page)
		done, err = u.Continue(m.at(1), m.page, ContinueDontWake)
		wantDone(t, "continue", done, err, m.page, nil)
		c.waits(t)
		if err := u.Wake(m.at(1), m.page); err != nil {
			t.Fatal(err)
		}
		c.ok(t)
		if alias[m.page] != 42 {
			t.Error("the write did not reach the file")
		}

		done, err = u.Continue(m.at(1), m.page, 0)
		wantDone(t, "continue again", done, err, 0, unix.EEXIST)
		if _, err = u.Continue(m.at(4), m.page, 0); err != nil {
			t.Fatal(err)
		}
		done, err = u.Continue(m.at(2), m.size-2*m.page, 0)
		wantDone(t, "continue up to a mapped page", done, err, 2*m.page, unix.EAGAIN)
		done, err = u.Continue(m.at(5), m.page, 1<<20)
		wantDone(t, "an unknown mode", done, err, 0, unix.EINVAL)
	})
}

// TestMinorAbsent continues where the file has no page.
func TestMinorAbsent(t *testing.T) {
	each(t, []kind{memfd, hugetlb}, func(t *testing.T, k kind) {
		needMinor(t, k)
		u := open(t, nil)
		m := k.memory(t)
		register(t, u, m, RegisterMissing|RegisterMinor)
		done, err := u.Continue(m.at(0), m.page, 0)
		wantDone(t, "continue a hole", done, err, 0, unix.EFAULT)

		// Missing and minor are told apart; a punched page is missing again.
		c := startPeek(m.at(0), m.page)
		nextFault(t, u, 0, m.at(0), m.page)
		if _, err := u.Copy(m.at(0), fill(m.page, 1), 0); err != nil {
			t.Fatal(err)
		}
		c.ok(t)
		if errno := madvise(m.addr, m.size, unix.MADV_DONTNEED); errno != 0 {
			t.Fatal(errno)
		}
		c = startPeek(m.at(0), m.page)
		nextFault(t, u, FaultMinor, m.at(0), m.page)
		punch(t, m, 0, 1)
		done, err = u.Continue(m.at(0), m.page, 0)
		wantDone(t, "continue a page punched out meanwhile", done, err, 0, unix.EFAULT)
		if err := u.Wake(m.at(0), m.page); err != nil {
			t.Fatal(err)
		}
		nextFault(t, u, 0, m.at(0), m.page)
		if _, err := u.Copy(m.at(0), fill(m.page, 2), 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(c.ok(t), fill(m.page, 2)) {
			t.Error("wrong contents")
		}
	})
}

func punch(t testing.TB, m *memory, i, n int) {
	t.Helper()
	if err := unix.Fallocate(m.file, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(i)*int64(m.page), int64(n)*int64(m.page)); err != nil {
		t.Fatal(err)
	}
}

// TestMinorWriteProtect maps a page of the file write-protected: a write is a fault of its own.
func TestMinorWriteProtect(t *testing.T) {
	need(t, HaveContinueWP())
	need(t, HaveWriteProtectShmem())
	each(t, minorKinds, func(t *testing.T, k kind) {
		u := open(t, nil)
		m := k.memory(t)
		alias := m.alias(t)
		copy(alias, fill(m.size, 1))
		register(t, u, m, RegisterMissing|RegisterMinor|RegisterWP)
		c := startPeek(m.at(0), m.page)
		nextFault(t, u, FaultMinor, m.at(0), m.page)
		done, err := u.Continue(m.at(0), 2*m.page, ContinueWP)
		wantDone(t, "continue", done, err, 2*m.page, nil)
		c.ok(t)
		wantBytes(t, m, 1, alias[m.page:2*m.page])
		wantProtected(t, u, m, 0)
		wantProtected(t, u, m, 1)
	})
}

// TestWholeExtent fills 2 MiB by one pwrite into a tmpfs with large folios, maps them by one Continue, and punches them out.
func TestWholeExtent(t *testing.T) {
	need(t, HaveContinueWP())
	u := open(t, nil)
	const extent = 2 << 20
	m := tmpfs.memorySize(t, 2*extent)
	register(t, u, m, RegisterMissing|RegisterMinor|RegisterWP)
	want := fill(extent, 5)
	if n, err := unix.Pwrite(m.file, want, extent); err != nil || n != extent {
		t.Fatal(n, err)
	}
	done, err := u.Continue(m.addr+extent, extent, ContinueWP)
	wantDone(t, "continue", done, err, extent, nil)
	first := int(extent / m.page)
	wantBytes(t, m, first, want)
	wantProtected(t, u, m, first)
	wantProtected(t, u, m, first+511)
	punch(t, m, first, 512)
	c := startPeek(m.at(first+7), m.page)
	nextFault(t, u, 0, m.at(first+7), m.page)
	if _, err := u.Copy(m.at(first+7), fill(m.page, 6), CopyWP); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c.ok(t), fill(m.page, 6)) {
		t.Error("wrong contents")
	}
}

// TestMinorCollapse collapses the pages of the file into a huge one under a registered mapping: entries may go, contents may not.
func TestMinorCollapse(t *testing.T) {
	need(t, HaveMinorShmem())
	u := open(t, nil)
	const extent = 2 << 20
	m := memfd.memorySize(t, extent)
	alias := m.alias(t)
	want := fill(extent, 1)
	copy(alias, want)
	register(t, u, m, RegisterMinor)
	for i := range extent / int(m.page) {
		c := startPeek(m.at(i), m.page)
		nextFault(t, u, FaultMinor, m.at(i), m.page)
		if _, err := u.Continue(m.at(i), m.page, 0); err != nil {
			t.Fatal(err)
		}
		c.ok(t)
	}
	if errno := madvise(m.addr, extent, unix.MADV_COLLAPSE); errno != 0 && errno != unix.EAGAIN && errno != unix.EINVAL {
		t.Fatal(errno)
	}
	for i := range extent / int(m.page) {
		c := startPeek(m.at(i), m.page)
		if answered := answerMinor(t, u, c); answered > 1 {
			t.Errorf("page %d: %d faults", i, answered)
		}
		if !bytes.Equal(c.ok(t), want[i*int(m.page):][:m.page]) {
			t.Fatalf("page %d changed", i)
		}
	}
}

// answerMinor continues whatever c faults on, until it is done.
func answerMinor(t testing.TB, u *FD, c *touch) (faults int) {
	t.Helper()
	var msg [1]Msg
	for {
		select {
		case <-c.done:
			return faults
		default:
		}
		if !pollIn(u.Fd(), 0) {
			continue
		}
		if n, err := u.Read(msg[:]); err != nil || n == 0 {
			t.Fatal(n, err)
		}
		faults++
		if _, err := u.Continue(msg[0].Address()&^4095, 4096, 0); err != nil {
			t.Fatal(&msg[0], err)
		}
	}
}
