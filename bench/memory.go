//go:build linux

package bench

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// words is mem as 64-bit words. It touches nothing.
func words(mem []byte) []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(mem))), len(mem)/8)
}

func address(mem []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))) }

// mapping is memory at a 2 MiB boundary, so that clusters and extents lie in the memory as they lie in the file.
type mapping struct {
	mem  []byte
	area []byte // what was mapped in all
}

// mapMemory maps size bytes, of a file from its start, or anonymous if fd is -1.
func mapMemory(fd, size int) (*mapping, error) {
	area, err := unix.Mmap(-1, 0, size+extent, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes of addresses: %w", size, err)
	}
	skip := int(-address(area) & (extent - 1))
	mem := area[skip : skip+size : skip+size]
	flags := unix.MAP_FIXED | unix.MAP_NORESERVE
	if fd < 0 {
		flags |= unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	} else {
		flags |= unix.MAP_SHARED
	}
	if _, err := unix.MmapPtr(fd, 0, unsafe.Pointer(unsafe.SliceData(mem)), uintptr(size), unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
		return nil, errors.Join(fmt.Errorf("map %d bytes: %w", size, err), unix.Munmap(area))
	}
	m := &mapping{mem: mem, area: area}
	if fd < 0 {
		if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: a kernel without huge pages
			return nil, errors.Join(fmt.Errorf("madvise: %w", err), m.close())
		}
	}
	return m, nil
}

func (m *mapping) close() error { return unix.Munmap(m.area) }

// framesFile makes a file for size bytes of pages, as the pager makes its own: on a detached tmpfs with large folios, else a memfd.
func framesFile(size int) (*os.File, error) {
	f, err := tmpfsFile(size)
	if err != nil {
		var fd int
		if fd, err = unix.MemfdCreate("bench", unix.MFD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("make a memfd: %w", err)
		}
		f = os.NewFile(uintptr(fd), "memfd:bench")
	}
	if err := f.Truncate(int64(size)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func tmpfsFile(size int) (*os.File, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "size", strconv.Itoa(size+extent)); err != nil {
		return nil, err
	}
	if err := unix.FsconfigSetString(fs, "huge", "within_size"); err != nil {
		return nil, err
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, err
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(mnt)
	fd, err := unix.Openat(mnt, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "tmpfs:bench"), nil
}

// warmUp touches n bytes and frees them, at most half of what is available: the pages that later faults get have been used before.
func warmUp(n int64) error {
	n = min(n, available()/2) &^ (extent - 1)
	if n == 0 {
		return nil
	}
	mem, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("warm up %d bytes of memory: %w", n, err)
	}
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE) // only faster
	for i := 0; i < len(mem); i += pageSize {
		mem[i] = 1
	}
	return unix.Munmap(mem)
}

// available is the memory that can be had without swapping, in bytes; 0 if unknown.
func available() int64 {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0
	}
	defer f.Close()
	var kb, n int64
	var name, unit string
	for {
		if k, err := fmt.Fscanln(f, &name, &kb, &unit); err != nil && k < 2 {
			return n << 10
		}
		if name == "MemAvailable:" {
			return kb << 10
		}
	}
}
