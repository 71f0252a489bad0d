//go:build linux

package uffd

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestNoAllocations holds the promise that success allocates nothing.
func TestNoAllocations(t *testing.T) {
	need(t, HaveMove())
	need(t, HaveContinueWP())
	u := open(t, nil)
	const n = 1000
	const runs = n - 8
	m, a, from := memfd.memorySize(t, n*memfd.pageSize()), anon.memorySize(t, n*anon.pageSize()), anon.memorySize(t, n*anon.pageSize())
	register(t, u, m, RegisterMissing|RegisterMinor|RegisterWP)
	register(t, u, a, RegisterMissing)
	clear(from.mem)
	for i := range from.mem {
		from.mem[i] = 1
	}
	src := fill(m.page, 1)
	msgs := make([]Msg, 4)
	regions := make([]PageRegion, 4)
	scan := &ScanOptions{All: PagePresent, MaxPages: 1}
	fd := pagemap(t)
	var failed error
	check := func(done int64, err error) {
		if err != nil || done != int64(m.page) {
			failed = err
		}
	}
	for _, c := range []struct {
		name string
		call func(i int)
	}{
		{"copy", func(i int) { check(u.Copy(m.at(i), src, CopyWP)) }},
		{"write-protect", func(i int) { failed = u.WriteProtect(m.at(i), m.page, 0) }},
		{"drop", func(i int) { madvise(m.at(i), m.page, unix.MADV_DONTNEED) }},
		{"continue", func(i int) { check(u.Continue(m.at(i), m.page, ContinueWP)) }},
		{"zeropage", func(i int) { check(u.Zeropage(a.at(i), a.page, 0)) }},
		{"drop", func(i int) { madvise(a.at(i), a.page, unix.MADV_DONTNEED) }},
		{"move", func(i int) { check(u.Move(a.at(i), from.at(i), a.page, 0)) }},
		{"drop", func(i int) { madvise(a.at(i), a.page, unix.MADV_DONTNEED) }},
		{"poison", func(i int) { check(u.Poison(a.at(i), a.page, 0)) }},
		{"wake", func(i int) { failed = u.Wake(m.at(i), m.page) }},
		{"read", func(int) { _, failed = u.Read(msgs) }},
		{"register", func(int) { _, failed = u.Register(m.addr, m.size, RegisterMissing|RegisterMinor|RegisterWP) }},
		{"unregister", func(int) { failed = u.Unregister(m.addr, m.size) }},
		{"scan", func(int) { _, _, failed = PagemapScan(fd, from.addr, from.addr+from.size, scan, regions) }},
	} {
		i := 0
		if got := testing.AllocsPerRun(runs, func() { c.call(i); i++ }); got != 0 {
			t.Errorf("%s allocates %v times", c.name, got)
		}
		if failed != nil {
			t.Fatalf("%s: %v", c.name, failed)
		}
	}
}

// TestSourceEscapes shows that the compiler keeps the buffers the kernel finds by number off the stack, which can move.
func TestSourceEscapes(t *testing.T) {
	u := open(t, nil)
	m := memfd.memorySize(t, 256*memfd.pageSize())
	register(t, u, m, RegisterMissing)
	i := 0
	if got := testing.AllocsPerRun(200, func() {
		var page [4096]byte
		u.Copy(m.at(i), page[:], 0)
		i++
	}); got != 1 {
		t.Errorf("a source page of Copy is allocated %v times on the heap, want 1", got)
	}
	if got := testing.AllocsPerRun(200, func() {
		var regions [4]PageRegion
		PagemapScan(-1, 0, 0, nil, regions[:])
	}); got < 2 { // and the error
		t.Errorf("PagemapScan's regions are allocated on the stack: %v", got)
	}
}
