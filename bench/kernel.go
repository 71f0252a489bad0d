//go:build linux

package bench

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// faultAround is the number of pages that the kernel maps when one resident page of a file is read.
const faultAround = 16

// anonSystem is the kernel's own anonymous memory.
type anonSystem struct{}

func (anonSystem) open(w workload) (*target, error) {
	if w.Op != ZeroRead && w.Op != ZeroWrite && w.Op != WriteProtect {
		return nil, fmt.Errorf("%w: anonymous memory", errNone)
	}
	m, err := mapMemory(-1, w.size())
	if err != nil {
		return nil, err
	}
	if w.Op == WriteProtect { // reads map the page of zeros, the write copies it
		if err := readAll(m.mem, false); err != nil {
			return nil, errors.Join(err, m.close())
		}
	}
	return &target{mem: m.mem, close: m.close}, nil
}

// memfdSystem is the kernel's own shared memory.
type memfdSystem struct{}

func (memfdSystem) open(w workload) (_ *target, err error) {
	if w.Op == WriteProtect || w.Op == StoredRead {
		return nil, fmt.Errorf("%w: shared memory of the kernel's own", errNone)
	}
	fd, err := unix.MemfdCreate("bench", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a memfd: %w", err)
	}
	file := os.NewFile(uintptr(fd), "memfd:bench")
	defer file.Close() // the mapping keeps the memory
	size, stride := w.size(), 1
	if w.Op == Minor { // each touch would map its neighbours
		size, stride = size*faultAround, faultAround
	}
	if err := file.Truncate(int64(size)); err != nil {
		return nil, fmt.Errorf("size the memfd: %w", err)
	}
	m, err := mapMemory(fd, size)
	if err != nil {
		return nil, err
	}
	t := &target{mem: m.mem, stride: stride, close: m.close}
	if w.Op == Minor {
		fillAll(m.mem)
		second, err := mapMemory(fd, size)
		if err != nil {
			return nil, errors.Join(err, m.close())
		}
		t.mem, t.stored = second.mem, true
		t.close = func() error { return errors.Join(m.close(), second.close()) }
	}
	return t, nil
}

// cachedFile is a file of patterns in the page cache.
type cachedFile struct {
	file *os.File
	size int
}

// newCachedFile writes one to dir, and unlinks it.
func newCachedFile(dir string, size int) (*cachedFile, error) {
	f, err := os.CreateTemp(dir, "machpager-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a file to read: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	page := make([]byte, pageSize) // written page by page, for a page cache of single pages: large folios are mapped 2 MiB at a touch
	for p := range size / pageSize {
		fillPage(words(page), p)
		if _, err := f.Write(page); err != nil {
			return nil, errors.Join(fmt.Errorf("write the file to read: %w", err), f.Close())
		}
	}
	return &cachedFile{f, size}, nil
}

// readSystem is read(2) of a cached file into fresh anonymous memory, a cluster at a time.
type readSystem struct{ src *cachedFile }

func (s readSystem) open(w workload) (*target, error) {
	if w.Op != StoredRead || !w.Single && w.Order != Sequential {
		return nil, fmt.Errorf("%w: read(2)", errNone)
	}
	m, err := mapMemory(-1, w.size())
	if err != nil {
		return nil, err
	}
	n := max(1, w.Cluster)
	return &target{mem: m.mem, stored: true, close: m.close, fetch: func(p int) {
		if p%n == 0 {
			b := m.mem[p*pageSize : min(len(m.mem), (p+n)*pageSize)]
			if k, err := unix.Pread(int(s.src.file.Fd()), b, int64(p)*pageSize); err != nil || k < len(b) {
				panic(fmt.Sprintf("read the cached file: %d of %d bytes: %v", k, len(b), err))
			}
		}
	}}, nil
}

// fileSystem is a mapping of a cached file.
type fileSystem struct{ src *cachedFile }

func (s fileSystem) open(w workload) (*target, error) {
	if w.Op != StoredRead {
		return nil, fmt.Errorf("%w: a file", errNone)
	}
	stride := 1
	size := w.size()
	if w.Single {
		stride, size = faultAround, min(size*faultAround, s.src.size)
	}
	m, err := mapMemory(int(s.src.file.Fd()), size)
	if err != nil {
		return nil, err
	}
	return &target{mem: m.mem, stride: stride, stored: true, close: m.close}, nil
}
