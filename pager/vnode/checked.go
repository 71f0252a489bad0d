package vnode

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/checked"
	"machpager/pager/emm"
)

// Checked makes a manager of a regular file in the format of package checked, for an object of size bytes: what Sync has confirmed survives the death of the machine, and a page that the
// device has torn or lost is an error (emm.MemoryError) with a line in the log. The file must be open for reading; if it is for writing too, one of size 0 is made a new file, of zeros, and
// one with less than size bytes of contents grows; one with more stays as it is, and the object is its beginning. O_APPEND, O_DIRECT and O_PATH are refused. f is the Pager's
// from then on, unless there is an error.
//
// One Pager at a time may have the file, or several that only read: it is locked (flock(2)), and unix.EBUSY says that somebody has it for longer than a second.
//
// A page that is torn is healed by Region.Discard, which writes zeros. Sync is two fdatasync(2). Once one has failed, all fail, as for [File].
func Checked(f *os.File, size int64, o *Options) (*Pager, error) {
	d, err := newDisk(f, o)
	if err != nil {
		return nil, err
	}
	if size <= 0 {
		return nil, fmt.Errorf("open checked file for an object of %d bytes: want 1 or more: %w", size, emm.InvalidArgument)
	}
	if err := d.lock(); err != nil {
		return nil, err
	}
	c, err := checked.Open(d, size, &checked.Options{ReadOnly: !d.writable})
	if err != nil {
		d.unlock()
		return nil, err
	}
	return newPager(&checkedContents{readWriter{r: c, w: c, flush: c.Sync, size: size}, c, d}, d.writable, o), nil
}

// CheckedSize is how many bytes of contents a file has that Checked can open; 0 for an empty file.
func CheckedSize(f *os.File) (int64, error) {
	d, err := newDisk(f, nil)
	if err != nil {
		return 0, err
	}
	return checked.Size(d)
}

// checkedContents is contents in a checked file.
type checkedContents struct {
	readWriter
	c *checked.File
	d *disk
}

func (c *checkedContents) peek(p []byte, off int64) bool { return c.c.PeekAt(p, off) }

func (c *checkedContents) close() error {
	c.d.unlock()
	return c.d.f.Close()
}

// disk is a regular file below a checked.File.
type disk struct {
	file
	writable bool
	id       inode
}

// newDisk looks whether a file can be one.
func newDisk(f *os.File, o *Options) (*disk, error) {
	st, err := stat(f)
	if err != nil {
		return nil, err
	}
	if st.block {
		return nil, fmt.Errorf("stat file: a block device: want a regular file: %w", unix.EINVAL)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open file: %w", err)
	}
	d := &disk{file: file{f: f, raw: raw}, writable: st.writable}
	d.outcome(o)
	var s unix.Stat_t
	if err := d.control(func(fd int) error { return unix.Fstat(fd, &s) }); err != nil {
		return nil, fmt.Errorf("stat file: %w", err)
	}
	d.id = inode{s.Dev, s.Ino}
	return d, nil
}

// control calls f with the descriptor until no signal comes in between.
func (d *disk) control(f func(fd int) error) error {
	var err error
	cerr := d.raw.Control(func(fd uintptr) {
		for err = unix.EINTR; errors.Is(err, unix.EINTR); {
			err = f(int(fd))
		}
	})
	return errors.Join(err, cerr)
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	failpoint.Here("vnode.write")
	n, err := d.f.WriteAt(p, off)
	failpoint.Here("vnode.written")
	return n, err
}

func (d *disk) Sync() error { return d.sync() }

func (d *disk) Length() (int64, error) {
	st, err := d.f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (d *disk) Truncate(n int64) error { return d.f.Truncate(n) }

func (d *disk) Punch(off, n int64) error {
	return d.control(func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

func (d *disk) Data(off int64) (next int64, err error) {
	err = d.control(func(fd int) (err error) {
		next, err = unix.Seek(fd, off, unix.SEEK_DATA) // nobody uses the file's own offset
		return err
	})
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, io.EOF
	case err != nil:
		return off, nil // a file system that does not tell
	}
	return next, nil
}

func (d *disk) PeekAt(p []byte, off int64) bool { return d.file.peek(p, off) }

// inode tells files apart.
type inode struct{ dev, ino uint64 }

// inUse are the checked files of this process: flock(2) does not tell them apart when they are open by one description.
var inUse = struct {
	sync.Mutex
	by map[inode][]*disk // guarded by Mutex; one that writes, or several that read
}{by: map[inode][]*disk{}}

// lockPatience is how long a file may still be another object's: one that is ending.
const lockPatience = time.Second

// lock makes the file this Pager's.
func (d *disk) lock() error {
	for end := time.Now().Add(lockPatience); ; time.Sleep(10 * time.Millisecond) {
		err := d.tryLock()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("open checked file: somebody else has it open (end that object, or close the file there): %w", unix.EBUSY)
		}
	}
}

func (d *disk) tryLock() error {
	inUse.Lock()
	defer inUse.Unlock()
	if by := inUse.by[d.id]; len(by) > 0 && (d.writable || by[0].writable) {
		return unix.EWOULDBLOCK
	}
	if err := d.flock(); errors.Is(err, unix.EWOULDBLOCK) {
		return err // another error: a file system without locks
	}
	inUse.by[d.id] = append(inUse.by[d.id], d)
	return nil
}

func (d *disk) flock() error {
	how := unix.LOCK_SH
	if d.writable {
		how = unix.LOCK_EX
	}
	return d.control(func(fd int) error { return unix.Flock(fd, how|unix.LOCK_NB) })
}

// unlock gives it up; a task that has the file open still must not hold others off.
func (d *disk) unlock() {
	inUse.Lock()
	defer inUse.Unlock()
	_ = d.control(func(fd int) error { return unix.Flock(fd, unix.LOCK_UN) })
	left := slices.DeleteFunc(inUse.by[d.id], func(e *disk) bool { return e == d })
	if len(left) == 0 {
		delete(inUse.by, d.id)
		return
	}
	inUse.by[d.id] = left
	for _, e := range left { // the lock may have been theirs as well
		_ = e.flock()
	}
}
