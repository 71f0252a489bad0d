package frames

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// A task that keeps the file of an object that has ended can go on to fill it, by fallocate, write, or a mapping that it never registered, and every
// frame that it takes is one that others may have reserved. Nothing can take a file away from who has it open. So the pool keeps those files too, and
// empties them when frames are missing, until it alone has them: what fcntl(2) grants a write lease for.

// buried is a file that was closed here and is open elsewhere.
type buried struct {
	fd       int
	released func() // called when fd is closed; may be nil
}

// bury empties a file and closes fd, which it takes over, or keeps it for Reap.
func (p *Pool) bury(fd int, released func()) error {
	err := unix.Ftruncate(fd, 0)
	p.mu.Lock()
	keep := !p.closed && shared(fd)
	if keep {
		p.left = append(p.left, buried{fd, released})
	}
	p.mu.Unlock()
	if !keep {
		if e := unix.Close(fd); err == nil {
			err = e
		}
		if released != nil {
			released()
		}
	}
	if err != nil {
		return fmt.Errorf("close frame file: %w", err)
	}
	return nil
}

// shared reports whether somebody else has the file open or mapped. Where leases cannot be had, nobody has.
func shared(fd int) bool {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
	if err == nil {
		unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
	}
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EBUSY)
}

// Reap takes back, in bytes, what tasks have put into files that were closed, and closes those that no task has any more.
func (p *Pool) Reap() (freed int64) {
	var released []func()
	p.mu.Lock()
	p.left = slices.DeleteFunc(p.left, func(b buried) bool {
		if n := blocks(b.fd); n > 0 && unix.Ftruncate(b.fd, 0) == nil {
			freed += n
		}
		if shared(b.fd) {
			return false
		}
		unix.Close(b.fd)
		if b.released != nil {
			released = append(released, b.released)
		}
		return true
	})
	strays := p.strays
	p.mu.Unlock()
	for _, fn := range released {
		fn()
	}
	if strays > 0 {
		p.Recount() // an error: next time
	}
	return freed
}

// Left is how many files were closed while tasks had them open, and are open still as far as is known.
func (p *Pool) Left() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.left)
}

// Trim takes away, in bytes, what a task has put behind the file's end by making it longer.
func (f *File) Trim() (freed int64, err error) {
	fd, err := f.use("trim")
	if err != nil {
		return 0, err
	}
	defer f.done()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("trim frame file: %w", err)
	}
	// The kernel keeps what fallocate put behind the end without making the file longer (FALLOC_FL_KEEP_SIZE): only a truncate takes it away.
	size := f.size.Load()
	before := st.Blocks
	if err := unix.Ftruncate(fd, size); err != nil {
		return 0, fmt.Errorf("trim frame file to %d bytes: %w", size, err)
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("trim frame file: %w", err)
	}
	return max(0, before-st.Blocks) * 512, nil
}

// blocks is how many bytes the kernel charges to a file.
func blocks(fd int) int64 {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}
