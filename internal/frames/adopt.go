package frames

import (
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// A pager that was killed leaves a mount and files of which others hold the descriptors. The pool of the one after it takes both over: [Options].Adopt
// and [Options].Mount, [Pool.AdoptFile] for each file of an object that lives, [Pool.AdoptClosed] for each of one that had ended, [Pool.Claim] for the frames that
// the page tables account for, and last [Pool.Recount].

// State is what a pool knows of its mount and the one after it cannot find out, for a mount in use is nothing to try things in. It goes with the machine's
// boot: no kernel changes under it.
type State struct {
	Kind    Kind // never Auto
	Extents bool // as Pool.Extents
	NoSwap  bool // as Pool.NoSwap
}

// State describes the pool to the one that will take its mount over.
func (p *Pool) State() State { return State{Kind: p.kind, Extents: p.extents, NoSwap: p.noswap} }

// Mount is the number of the mount's descriptor, to be handed to the process that shall keep it; -1: there is none (Memfd). It is good until Close.
func (p *Pool) Mount() int {
	if p.mount == nil {
		return -1
	}
	return p.mount.fd
}

// adopt is open for the mount of an earlier pool. f stays the caller's.
func (p *Pool) adopt(s State, f *os.File) error {
	switch {
	case s.Kind != Tmpfs && s.Kind != TmpfsUserNS && s.Kind != Memfd:
		return fmt.Errorf("take over: %v: %w (no such kind)", s.Kind, unix.EINVAL)
	case (s.Kind == Memfd) != (f == nil):
		return fmt.Errorf("take over: %v: %w (a mount is needed for tmpfs, and none for memfds)", s.Kind, unix.EINVAL)
	}
	p.kind, p.extents, p.noswap, p.adopted = s.Kind, s.Extents, s.NoSwap, true
	if f == nil {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("take over mount: statfs: %w", err)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return fmt.Errorf("take over mount: file system %#x: %w (it is no tmpfs)", st.Type, unix.EINVAL)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("take over mount: duplicate: %w", err)
	}
	m := &mount{fd: fd, ctl: -1, huge: s.Extents, noswap: s.NoSwap, pick: fspick}
	if s.Kind == TmpfsUserNS {
		m.pick = pickInUserNS
	}
	if have := int64(st.Blocks) * st.Bsize; have != p.budget.Load()*PageSize {
		if err := m.setSize(p.budget.Load() * PageSize); err != nil {
			// Pages must be paged out first, by who can: SetBudget later.
			p.log.Warn("frames: the budget stays as it was for now", "budget", have, "wanted", p.budget.Load()*PageSize, "why", err)
			p.budget.Store(have / PageSize)
			p.free.Store(have / PageSize)
		}
	}
	p.mount = m
	return nil
}

// AdoptFile is NewFile for a file that an earlier pool made, size bytes long, rounded up to whole pages; what lies in it stays. If a task has cut it off, it
// is made as long again. On success f is the pool's; on an error it stays the caller's. The frames in it are for the caller to count: see Claim.
func (p *Pool) AdoptFile(f *os.File, size int64) (*File, error) {
	if size < 0 || size > math.MaxInt64-PageSize {
		return nil, fmt.Errorf("take over frame file of %d bytes: %w", size, unix.EINVAL)
	}
	fd, err := p.ours(f)
	if err != nil {
		return nil, fmt.Errorf("take over frame file: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		unix.Close(fd)
		return nil, fmt.Errorf("take over frame file: %w", os.ErrClosed)
	}
	n := &File{pool: p, fd: fd}
	if err := n.Truncate(size); err != nil {
		unix.Close(fd)
		return nil, err
	}
	f.Close()
	p.files[n] = struct{}{}
	return n, nil
}

// AdoptClosed takes over a file whose object had ended, but that a task may still have open: it is emptied, now and whenever frames are missing, until nobody
// else has it (Reap). released, which may be nil, is called then, from any goroutine and without a lock. f is closed, also on an error.
func (p *Pool) AdoptClosed(f *os.File, released func()) error {
	fd, err := p.ours(f)
	f.Close()
	if err != nil {
		return fmt.Errorf("take over closed frame file: %w", err)
	}
	return p.bury(fd, released)
}

// ours duplicates the descriptor of a file that is this pool's to use: an unlinked file on its mount, or a memfd.
func (p *Pool) ours(f *os.File) (int, error) {
	var st, dir unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return -1, fmt.Errorf("stat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 0 {
		return -1, fmt.Errorf("%w (it is no unlinked file)", unix.EINVAL)
	}
	if p.mount != nil {
		if err := unix.Fstat(p.mount.fd, &dir); err != nil {
			return -1, fmt.Errorf("stat mount: %w", err)
		}
		if st.Dev != dir.Dev {
			return -1, fmt.Errorf("%w (it is on another file system than the frames)", unix.EXDEV)
		}
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("duplicate: %w", err)
	}
	return fd, nil
}

// Claim takes n frames that are in use already, whatever the budget says: those that an adopted page table accounts for. Where they are more than the budget, nothing can
// be reserved until enough were released. They are released like others.
func (p *Pool) Claim(n int64) { p.free.Add(-max(0, n)) }

// Recount takes the frames of files that nobody here knows: those of objects that had ended while a task had their files open, when the descriptor died with the
// earlier pager. They cannot be emptied, and go with the tasks; until then they are nobody's to reserve. Reap looks again. It returns how many bytes they are.
func (p *Pool) Recount() (int64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, fmt.Errorf("recount frames: %w", os.ErrClosed)
	}
	if p.mount == nil || !p.adopted {
		return 0, nil // memfds are counted by whom they belong to
	}
	used, err := p.mount.usage()
	if err != nil {
		return 0, fmt.Errorf("recount frames: %w", err)
	}
	for _, b := range p.left {
		used -= blocks(b.fd)
	}
	for f := range p.files {
		n, err := f.Blocks()
		if err != nil && !errors.Is(err, os.ErrClosed) {
			return 0, fmt.Errorf("recount frames: %w", err)
		}
		used -= n
	}
	strays := max(0, used/PageSize)
	p.free.Add(p.strays - strays)
	p.strays = strays
	return strays * PageSize, nil
}
