//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func procPath(pid int, name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }

func pagemap(t testing.TB) int {
	t.Helper()
	f, err := os.Open(procPath(os.Getpid(), "pagemap"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// TestPagemapScan finds present pages, in runs, bounded and resumed.
func TestPagemapScan(t *testing.T) {
	need(t, HavePagemapScan())
	watch(t)
	fd := pagemap(t)
	m := anon.memory(t)
	for _, i := range []int{1, 2, 5} {
		if err := poke(m.at(i), []byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	end := m.addr + m.size
	o := &ScanOptions{All: PagePresent, Return: PagePresent | PageFile}
	regions := make([]PageRegion, pages)
	n, walked, err := PagemapScan(fd, m.addr, end, o, regions)
	want := []PageRegion{{m.at(1), m.at(3), PagePresent}, {m.at(5), m.at(6), PagePresent}}
	if err != nil || walked != end || !slices.Equal(regions[:n], want) {
		t.Errorf("scan: %x, end %#x, %v; want %x", regions[:n], walked, err, want)
	}

	n, walked, err = PagemapScan(fd, m.addr, end, o, regions[:1])
	if err != nil || n != 1 || regions[0] != want[0] || walked >= end || walked < m.at(3) {
		t.Errorf("one region: %x, end %#x, %v", regions[:n], walked, err)
	}
	n, _, err = PagemapScan(fd, walked, end, o, regions)
	if err != nil || !slices.Equal(regions[:n], want[1:]) {
		t.Errorf("go on: %x, %v", regions[:n], err)
	}

	o.MaxPages = 1
	n, walked, err = PagemapScan(fd, m.addr, end, o, regions)
	if err != nil || n != 1 || regions[0] != (PageRegion{m.at(1), m.at(2), PagePresent}) || walked != m.at(2) {
		t.Errorf("one page: %x, end %#x, %v", regions[:n], walked, err)
	}

	o = &ScanOptions{Inverted: PagePresent, All: PagePresent} // absent
	n, _, err = PagemapScan(fd, m.addr, end, o, regions)
	if err != nil || n != 3 || regions[1].Start != m.at(3) || regions[1].End != m.at(5) {
		t.Errorf("absent pages: %x, %v", regions[:n], err)
	}
	n, _, err = PagemapScan(fd, m.addr, end, &ScanOptions{Any: PageFile | PageSwapped}, regions)
	if err != nil || n != 0 {
		t.Errorf("neither file nor swapped: %x, %v", regions[:n], err)
	}

	_, _, err = PagemapScan(fd, m.addr+1, end, o, regions)
	var e *Error
	if !errors.Is(err, unix.EINVAL) || !errors.As(err, &e) || e.Start != m.addr+1 {
		t.Errorf("an unaligned start: %v", err)
	}
}

// TestWPAsync lets the kernel resolve write-protect faults, and PagemapScan tell and reset what was written.
func TestWPAsync(t *testing.T) {
	need(t, HaveWPAsync())
	need(t, HavePagemapScan())
	each(t, []kind{anon, memfd, tmpfs, hugetlb}, func(t *testing.T, k kind) {
		u := open(t, &OpenOptions{Features: FeatureWPAsync | FeatureWPUnpopulated})
		fd := pagemap(t)
		m := k.memory(t)
		if _, _, err := PagemapScan(fd, m.addr, m.addr+m.size, &ScanOptions{Flags: ScanCheckWPAsync | ScanWPMatching, All: PageWritten}, nil); !errors.Is(err, unix.EPERM) {
			t.Errorf("protect memory that is not registered: %v", err)
		}
		register(t, u, m, RegisterWP)
		if err := u.WriteProtect(m.addr, m.size, WriteProtectWP); err != nil {
			t.Fatal(err)
		}
		for _, i := range []int{3, 4} {
			if err := poke(m.at(i), []byte{1}); err != nil { // nobody answers, and nobody need
				t.Fatal(err)
			}
		}
		o := &ScanOptions{Flags: ScanCheckWPAsync | ScanWPMatching, All: PageWritten, Return: PageWritten | PageWPAllowed}
		regions := make([]PageRegion, pages)
		n, _, err := PagemapScan(fd, m.addr, m.addr+m.size, o, regions)
		if want := (PageRegion{m.at(3), m.at(5), PageWritten | PageWPAllowed}); err != nil || n != 1 || regions[0] != want {
			t.Errorf("written: %x, %v; want %x", regions[:n], err, want)
		}
		if n, _, err = PagemapScan(fd, m.addr, m.addr+m.size, o, regions); err != nil || n != 0 {
			t.Errorf("after the reset: %x, %v", regions[:n], err)
		}
		if pollIn(u.Fd(), 0) {
			t.Error("a message in spite of WP_ASYNC")
		}
	})
}
