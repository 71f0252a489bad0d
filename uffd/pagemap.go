//go:build linux

package uffd

import (
	"golang.org/x/sys/unix"
)

// PageRegion is a run of pages with the same categories: struct page_region.
type PageRegion struct {
	Start, End uint64       // bytes
	Categories PageCategory // those asked for by ScanOptions.Return
}

// ScanOptions selects the pages PagemapScan reports. A page matches if, after the categories in Inverted are turned round, it has all of
// All and, unless Any is 0, one of Any. nil: every page, with no categories returned.
type ScanOptions struct {
	Flags    ScanFlags
	MaxPages uint64       // stop after as many pages matched; 0: no limit
	Inverted PageCategory // these count as present where they are absent
	All      PageCategory
	Any      PageCategory
	Return   PageCategory // what to tell of the pages that match
}

// PagemapScan walks the page table of a process from start to end (bytes, start on a page) and writes the runs of pages that match to
// regions. pagemap is a descriptor of /proc/PID/pagemap. It returns how many regions it wrote, and where the walk ended: less than end
// when regions or MaxPages were used up; go on there. With no regions it only does what Flags says. PAGEMAP_SCAN, 6.7.
func PagemapScan(pagemap int, start, end uint64, o *ScanOptions, regions []PageRegion) (n int, walkEnd uint64, err error) {
	if o == nil {
		o = &ScanOptions{}
	}
	a := scanArg{
		flags: uint64(o.Flags), start: start, end: end, maxPages: o.MaxPages,
		inverted: o.Inverted, mask: o.All, anyOf: o.Any, returned: o.Return,
	}
	n, errno := scanPages(pagemap, regions, &a)
	if errno != 0 {
		return 0, a.walkEnd, &Error{Op: "scan pagemap", Start: start, Len: end - start, Errno: errno}
	}
	return n, a.walkEnd, nil
}

// HavePagemapScan tells whether PagemapScan works. Linux 6.7.
func HavePagemapScan() error { return pagemapScanProbe.have() }

var pagemapScanProbe = probe{name: "PAGEMAP_SCAN", kernel: "6.7", try: func() (bool, error) {
	fd, err := unix.Open("/proc/self/pagemap", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	_, errno := scanPages(fd, nil, &scanArg{}) // an empty range
	switch errno {
	case 0:
		return true, nil
	case unix.ENOTTY, unix.EINVAL:
		return false, nil
	}
	return false, errno
}}
