//go:build linux

package uffd

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMove moves pages of private memory to where a thread waits for them.
func TestMove(t *testing.T) {
	need(t, HaveMove())
	u := open(t, nil)
	m, src := anon.memory(t), anon.memory(t)
	register(t, u, m, RegisterMissing)
	want := fill(src.size, 1)
	copy(src.mem, want)
	c := startPeek(m.at(0), m.page)
	nextFault(t, u, 0, m.at(0), m.page)
	done, err := u.Move(m.at(0), src.at(0), m.page, MoveDontWake)
	wantDone(t, "move", done, err, m.page, nil)
	c.waits(t)
	if err := u.Wake(m.at(0), m.page); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c.ok(t), want[:m.page]) {
		t.Error("wrong contents")
	}
	if src.mem[0] != 0 { // src is registered nowhere: absent pages are zeros
		t.Error("the source still has the page")
	}
	done, err = u.Move(m.at(0), src.at(1), m.page, 0)
	wantDone(t, "move onto a page", done, err, 0, unix.EEXIST)
	done, err = u.Move(m.at(1), src.at(1), m.page, 1<<20)
	wantDone(t, "an unknown mode", done, err, 0, unix.EINVAL)

	done, err = u.Move(m.at(1), src.at(1), 2*m.page, 0)
	wantDone(t, "move two", done, err, 2*m.page, nil)
	if errno := madvise(src.at(5), m.page, unix.MADV_DONTNEED); errno != 0 {
		t.Fatal(errno)
	}
	done, err = u.Move(m.at(3), src.at(3), 4*m.page, 0)
	wantDone(t, "move up to a hole", done, err, 2*m.page, unix.EAGAIN)
	done, err = u.Move(m.at(5), src.at(5), 2*m.page, 0)
	wantDone(t, "move a hole", done, err, 0, unix.ENOENT)
	done, err = u.Move(m.at(5), src.at(5), 2*m.page, MoveAllowSrcHoles)
	wantDone(t, "move over a hole", done, err, 2*m.page, nil)
	wantBytes(t, m, 4, want[4*m.page:5*m.page])
	wantBytes(t, m, 6, want[6*m.page:7*m.page])
}

// TestMoveHuge moves a transparent huge page whole, and one that must be split since the range begins in it.
func TestMoveHuge(t *testing.T) {
	need(t, HaveMove())
	const extent = 2 << 20
	for _, c := range []struct {
		name string
		off  uint64
	}{{"whole", 0}, {"split", extent / 2}} {
		t.Run(c.name, func(t *testing.T) {
			u := open(t, nil)
			m, src := anon.memorySize(t, 2*extent), anon.memorySize(t, 2*extent)
			madvise(src.addr, src.size, unix.MADV_HUGEPAGE)
			want := fill(src.size, 1)
			copy(src.mem, want)
			madvise(m.addr, m.size, unix.MADV_HUGEPAGE)
			register(t, u, m, RegisterMissing)
			var moved uint64
			for moved < extent {
				done, err := u.Move(m.addr+c.off+moved, src.addr+c.off+moved, extent-moved, 0)
				moved += uint64(done)
				if err != nil && done == 0 {
					t.Fatal(moved, err)
				}
			}
			got, err := peek(m.addr+c.off, extent)
			if err != nil || !bytes.Equal(got, want[c.off:][:extent]) {
				t.Errorf("wrong contents: %v", err)
			}
		})
	}
}

// TestMoveShared shows that shared memory cannot be moved.
func TestMoveShared(t *testing.T) {
	need(t, HaveMove())
	u := open(t, nil)
	m, src := memfd.memory(t), anon.memory(t)
	copy(src.mem, fill(src.size, 1))
	register(t, u, m, RegisterMissing)
	done, err := u.Move(m.at(0), src.at(0), m.page, 0)
	wantDone(t, "move to shared memory", done, err, 0, unix.EINVAL)
}
