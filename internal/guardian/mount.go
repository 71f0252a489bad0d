package guardian

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
)

// mount is the tmpfs of the frames, whose size the guardian changes when it is asked to: that needs a capability that the pager, which speaks with everybody, is better without. So that a
// pager that was taken over gains nothing by it, no other file system is ever changed than the tmpfs that the first pager asked for, before it spoke with anybody.
type mount struct {
	set func(mountfd, ctlfd int, size int64) error // immutable

	mu    sync.Mutex
	known bool   // guarded by mu
	dev   uint64 // guarded by mu; the file system
}

func (t *mount) resize(size int64, m *ipc.Message) error {
	if t.set == nil {
		return fmt.Errorf("guardian: resize tmpfs: %w", errors.ErrUnsupported)
	}
	fd, ctl := m.FD(0), -1
	if m.NumFDs() > 1 {
		ctl = m.FD(1)
	}
	var fs unix.Statfs_t
	var st unix.Stat_t
	if err := errors.Join(unix.Fstatfs(fd, &fs), unix.Fstat(fd, &st)); err != nil {
		return fmt.Errorf("guardian: resize tmpfs: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if fs.Type != unix.TMPFS_MAGIC || t.known && t.dev != st.Dev || size <= 0 {
		return fmt.Errorf("guardian: resize tmpfs: file system %#x of device %#x to %d bytes: want the tmpfs of the frames: %w", fs.Type, st.Dev, size, unix.EPERM)
	}
	t.known, t.dev = true, st.Dev
	if err := t.set(fd, ctl, size); err != nil {
		return fmt.Errorf("guardian: resize tmpfs: %w", err)
	}
	return nil
}
