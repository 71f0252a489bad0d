//go:build linux

package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"machpager/region"
)

// pagedMemory is memory that does not fit, of one of the systems.
type pagedMemory interface {
	bytes() []byte
	// cold has everything in the store, and nothing in memory.
	cold() error
	// advise says whether pages will be touched at random.
	advise(random bool) error
	counters() (traffic, error)
	close() error
}

// traffic counts from the beginning of a pagedMemory, in bytes.
type traffic struct {
	In, Out  int64 // from the store and to it
	Resident int64 // now; -1: unknown
}

// regionMemory is a memory object of the default pager, mapped.
type regionMemory struct {
	ctx    context.Context
	region *region.Region
}

func openRegion(ctx context.Context, p *region.Pager, size int64) (*regionMemory, error) {
	r, err := p.Allocate(ctx, size, nil)
	if err != nil {
		return nil, err
	}
	return &regionMemory{ctx, r}, nil
}

func (m *regionMemory) bytes() []byte { return m.region.Bytes() }
func (m *regionMemory) cold() error   { return m.region.PageOut(m.ctx, 0, m.region.Size()) }
func (m *regionMemory) close() error  { return m.region.Close() }

func (m *regionMemory) advise(random bool) error {
	a := region.Normal
	if random {
		a = region.Random
	}
	return m.region.Advise(m.ctx, 0, m.region.Size(), a)
}

func (m *regionMemory) counters() (traffic, error) {
	s := m.region.Stats()
	if s.Errors > 0 {
		return traffic{}, fmt.Errorf("%d memory errors", s.Errors)
	}
	return traffic{In: int64(s.PagesIn) * pageSize, Out: int64(s.PagesOut) * pageSize, Resident: s.Resident}, nil
}

// fileMemory is a mapped file.
type fileMemory struct {
	file *os.File
	m    *mapping
}

func openFileMemory(dir string, size int64) (*fileMemory, error) {
	f, err := os.CreateTemp(dir, "mapped-")
	if err != nil {
		return nil, err
	}
	// The file has blocks from the beginning, as a paging file that is in use has.
	err = errors.Join(os.Remove(f.Name()), unix.Fallocate(int(f.Fd()), 0, 0, size))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make a file to map: %w", err), f.Close())
	}
	m, err := mapMemory(int(f.Fd()), int(size))
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &fileMemory{f, m}, nil
}

func (m *fileMemory) bytes() []byte { return m.m.mem }
func (m *fileMemory) close() error  { return errors.Join(m.m.close(), m.file.Close()) }

func (m *fileMemory) cold() error {
	if err := unix.Msync(m.m.mem, unix.MS_SYNC); err != nil {
		return fmt.Errorf("msync: %w", err)
	}
	if err := unix.Madvise(m.m.mem, unix.MADV_DONTNEED); err != nil {
		return fmt.Errorf("madvise: %w", err)
	}
	if err := unix.Fadvise(int(m.file.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("drop from the page cache: %w", err)
	}
	return nil
}

func (m *fileMemory) advise(random bool) error {
	a := unix.MADV_NORMAL
	if random {
		a = unix.MADV_RANDOM
	}
	if err := unix.Madvise(m.m.mem, a); err != nil {
		return fmt.Errorf("madvise: %w", err)
	}
	return nil
}

// counters are the process's, from proc_pid_io(5): bytes that came from the device, and bytes that will go there.
func (m *fileMemory) counters() (traffic, error) {
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return traffic{}, err
	}
	t := traffic{Resident: -1}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch n, _ := strconv.ParseInt(value, 10, 64); name {
		case "read_bytes":
			t.In = n
		case "write_bytes":
			t.Out = n
		}
	}
	return t, nil
}

// cpuTime is what all threads of a process have had of CPUs, in ns.
func cpuTime(pid int) (total int64) {
	names, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil {
			on, _, _ := strings.Cut(string(b), " ")
			n, _ := strconv.ParseInt(on, 10, 64)
			total += n
		}
	}
	return total
}
