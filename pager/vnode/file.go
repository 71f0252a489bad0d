package vnode

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/emm"
)

// ErrTruncated says that a file is shorter than it was.
var ErrTruncated = errors.New("the file was truncated by somebody else")

// File makes a manager of a regular file or a block device, for an object of size bytes. The file must be open for reading; if it is for writing too, what is
// changed goes back, otherwise only read-only mappings can be made. O_APPEND, O_DIRECT and O_PATH are refused,
// and so are files that the kernel makes up, in /proc and the like; a memory file that is sealed against writing can be read only. f is the Pager's from then on, unless there is
// an error; its flags (fcntl F_SETFL) must not be changed any more.
//
// The object may be larger than a regular file. What lies beyond the file's end reads as zeros, and the file grows to hold what is written there: up to the
// last byte other than zero, never beyond size, and never merely to fill a page.
//
// A file that somebody truncates loses its pages: reading them is an error, until the file is long enough again; so is writing one behind the new end, for the hole
// before it would read as zeros. What somebody else writes to the file is seen in pages that are not resident, and overwritten by pages that are dirty: the
// object is no part of the kernel's page cache.
//
// Sync is fdatasync(2). Once it has failed, it fails for good, with emm.MemoryFailure, for the kernel reports a lost write only once: nobody knows then what is
// on the device.
func File(f *os.File, size int64, o *Options) (*Pager, error) {
	st, err := stat(f)
	if err != nil {
		return nil, err
	}
	if size <= 0 {
		return nil, fmt.Errorf("open file for an object of %d bytes: want 1 or more: %w", size, emm.InvalidArgument)
	}
	if st.block && size > st.size {
		return nil, fmt.Errorf("open block device of %d bytes for an object of %d: it cannot grow: %w", st.size, size, emm.InvalidArgument)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open file: %w", err)
	}
	c := &file{f: f, raw: raw, size: size, block: st.block}
	c.outcome(o)
	c.end.Store(min(st.size, size))
	return newPager(c, st.writable, o), nil
}

// outcome takes over what the options say of fdatasync.
func (c *file) outcome(o *Options) {
	if o == nil {
		return
	}
	if c.onLost = o.OnLost; o.Lost {
		c.lost = fmt.Errorf("fdatasync failed in an earlier pager: what is on the device is unknown: %w", emm.MemoryFailure)
	}
}

// FileSize is how many bytes a regular file or a block device has.
func FileSize(f *os.File) (int64, error) {
	st, err := stat(f)
	return st.size, err
}

type fileStat struct {
	size            int64
	block, writable bool
}

// stat looks at the kind of a file, how it is open, and its size.
func stat(f *os.File) (s fileStat, err error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return s, fmt.Errorf("stat file: %w", err)
	}
	cerr := rc.Control(func(fd uintptr) { s, err = statFd(int(fd)) })
	return s, errors.Join(err, cerr)
}

func statFd(fd int) (s fileStat, err error) {
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err != nil {
		return s, fmt.Errorf("stat file: %w", err)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return s, fmt.Errorf("stat file: read its flags: %w", err)
	}
	switch {
	case flags&unix.O_PATH != 0 || flags&unix.O_ACCMODE == unix.O_WRONLY:
		return s, fmt.Errorf("stat file: it is not open for reading (open it with O_RDONLY or O_RDWR): %w", unix.EBADF)
	case flags&unix.O_APPEND != 0:
		return s, fmt.Errorf("stat file: it is open for appending, where pwrite ignores its offset (open it without O_APPEND): %w", unix.EINVAL)
	case flags&unix.O_DIRECT != 0:
		return s, fmt.Errorf("stat file: it is open for direct I/O (open it without O_DIRECT): %w", unix.EINVAL)
	}
	if err := checkFileSystem(fd); err != nil {
		return s, err
	}
	s.writable = flags&unix.O_ACCMODE == unix.O_RDWR
	if seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err == nil && seals&(unix.F_SEAL_WRITE|unix.F_SEAL_FUTURE_WRITE) != 0 {
		s.writable = false // a memory file
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		s.size = st.Size
	case unix.S_IFBLK:
		s.block = true
		n, err := unix.IoctlGetInt(fd, unix.BLKGETSIZE64)
		if err != nil {
			return s, fmt.Errorf("stat file: size of block device: %w", err)
		}
		s.size = int64(n)
	default:
		return s, fmt.Errorf("stat file: mode %#o: want a regular file or a block device: %w", st.Mode, unix.EINVAL)
	}
	return s, nil
}

// madeUp are file systems whose files are made up by the kernel as they are read, and where a write does something else than to keep bytes: perhaps with the rights of who writes, which
// are not those of who opened it.
var madeUp = []int64{unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC,
	unix.BPF_FS_MAGIC, unix.EFIVARFS_MAGIC, unix.PSTOREFS_MAGIC, unix.SELINUX_MAGIC, unix.SMACK_MAGIC, unix.BINFMTFS_MAGIC, unix.RDTGROUP_SUPER_MAGIC, unix.NSFS_MAGIC,
	unix.XENFS_SUPER_MAGIC, configfsMagic, unix.HUGETLBFS_MAGIC}

// configfsMagic is of linux/fs/configfs, and in no header.
const configfsMagic = 0x62656570

// checkFileSystem refuses files that are none.
func checkFileSystem(fd int) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return fmt.Errorf("stat file: its file system: %w", err)
	}
	if slices.Contains(madeUp, int64(st.Type)) {
		return fmt.Errorf("stat file: it is on a file system of the kernel's own (type %#x), where files keep no bytes (copy it elsewhere): %w", st.Type, unix.EINVAL)
	}
	return nil
}

// file is contents in a file.
type file struct {
	f     *os.File        // immutable
	size  int64           // immutable; of the object, in bytes
	block bool            // immutable
	raw   syscall.RawConn // immutable; of f
	never atomic.Bool     // the file system does not read without waiting
	end   atomic.Int64    // bytes that the file has, as far as we know: it only grows, so a file that is shorter was truncated

	onLost func() // immutable; nil: nobody is told

	syncMu sync.Mutex
	lost   error // guarded by syncMu: what fdatasync said when it failed
}

func (c *file) limit() int64 { return c.size }

func (c *file) read(p []byte, off int64) (int, error) {
	p = p[:min(int64(len(p)), c.size-off)]
	end := c.end.Load() // before the read: it may grow meanwhile
	n, err := c.f.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	if has := off + int64(n); has < min(end, off+int64(len(p))) {
		return n, fmt.Errorf("read %d bytes at %d: %d came, where there were bytes up to %d: %w", len(p), off, n, end, ErrTruncated)
	}
	if n > 0 {
		c.grown(off + int64(n))
	}
	return n, nil
}

func (c *file) peek(p []byte, off int64) bool {
	if c.never.Load() || len(p) == 0 {
		return false
	}
	n, err := 0, error(nil)
	if cerr := c.raw.Control(func(fd uintptr) { n, err = unix.Preadv2(int(fd), [][]byte{p}, off, unix.RWF_NOWAIT) }); cerr != nil {
		return false
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
		c.never.Store(true)
	}
	if err != nil || n < len(p) {
		return false // not all is in memory, or the file is shorter: a worker will see
	}
	c.grown(off + int64(n))
	return true
}

func (c *file) write(p []byte, off int64) error {
	end := c.end.Load()
	known := min(max(0, end-off), int64(len(p)))
	p = p[:known+int64(len(bytes.TrimRight(p[known:], "\x00")))]
	if len(p) == 0 {
		return nil
	}
	if !c.block {
		s, err := c.f.Stat()
		if err != nil {
			return err
		}
		if has := s.Size(); has < min(off, end) {
			return fmt.Errorf("write %d bytes at %d: the file has %d bytes, where there were %d: %w", len(p), off, has, end, ErrTruncated)
		}
	}
	failpoint.Here("vnode.write")
	n, err := c.f.WriteAt(p, off)
	failpoint.Here("vnode.written")
	if n > 0 {
		c.grown(off + int64(n))
	}
	return err
}

// grown notes that the file has bytes up to n.
func (c *file) grown(n int64) {
	for old := c.end.Load(); n > old && !c.end.CompareAndSwap(old, n); old = c.end.Load() {
	}
}

func (c *file) sync() error {
	c.syncMu.Lock()
	defer c.syncMu.Unlock()
	if c.lost != nil {
		return c.lost
	}
	failpoint.Here("vnode.sync")
	var err error
	cerr := c.raw.Control(func(fd uintptr) {
		for err = unix.EINTR; errors.Is(err, unix.EINTR); {
			err = unix.Fdatasync(int(fd))
		}
	})
	err = errors.Join(err, cerr)
	failpoint.Here("vnode.synced")
	if err != nil {
		if c.onLost != nil {
			c.onLost()
		}
		c.lost = fmt.Errorf("fdatasync: what is on the device is unknown from now on: %w: %w", emm.MemoryFailure, err)
	}
	return c.lost
}

func (c *file) close() error { return c.f.Close() }
