package frames

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// mount is a detached tmpfs: it is at no path, and goes with its fd and the last file.
type mount struct {
	fd     int                            // the mount; immutable until close
	huge   bool                           // the kernel took huge=within_size
	noswap bool                           // the kernel took noswap
	pick   func(mountfd int) (int, error) // makes an fd that reconfigures the mount

	mu  sync.Mutex
	by  func(mountfd, ctlfd int, size int64) error // guarded by mu; changes the size in the place of this process; nil: done here
	ctl int                                        // fd of fspick; guarded by mu; -1: to be made by pick
}

// mountHere makes a mount with the privileges of this process (CAP_SYS_ADMIN).
func mountHere(size int64, huge bool) (*mount, error) {
	m, err := mountTmpfs(size, huge, true)
	if err != nil {
		return nil, err
	}
	m.pick = fspick
	return m, nil
}

// mountTmpfs makes the mount, size in bytes. huge and noswap are left out where the kernel refuses them.
func mountTmpfs(size int64, huge, noswap bool) (*mount, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen tmpfs: %w (needs CAP_SYS_ADMIN)", err)
	}
	defer unix.Close(fs)
	m := &mount{ctl: -1}
	for _, o := range []struct{ key, value string }{
		{"source", "machpager"},
		{"mode", "0700"},
		{"size", strconv.FormatInt(size, 10)},
	} {
		if err := unix.FsconfigSetString(fs, o.key, o.value); err != nil {
			return nil, fsError(fs, "set tmpfs "+o.key+"="+o.value, err)
		}
	}
	// Either may be refused: huge by a kernel without transparent huge pages, noswap before 6.4 and in a user namespace.
	m.huge = huge && unix.FsconfigSetString(fs, "huge", "within_size") == nil
	m.noswap = noswap && unix.FsconfigSetFlag(fs, "noswap") == nil
	drain(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fsError(fs, "create tmpfs", err)
	}
	m.fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fsError(fs, "fsmount tmpfs", err)
	}
	return m, nil
}

// tmpfile makes an unlinked file.
func (m *mount) tmpfile() (int, error) {
	for {
		fd, err := unix.Openat(m.fd, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC|unix.O_LARGEFILE, 0o600)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return -1, fmt.Errorf("open unlinked file on tmpfs: %w", err)
		}
		return fd, nil
	}
}

// usage is in bytes.
func (m *mount) usage() (int64, error) {
	var st unix.Statfs_t
	for {
		err := unix.Fstatfs(m.fd, &st)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("statfs tmpfs: %w", err)
		}
		return int64(st.Blocks-st.Bfree) * st.Bsize, nil
	}
}

// ResizeBy has by change the size of the pool's mount from now on, for this process is about to give up the capability: see SetMountSize. It is tried at once, with the size there
// is. Nothing happens in a pool of memory files.
func (p *Pool) ResizeBy(by func(mountfd, ctlfd int, size int64) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mount == nil {
		return nil
	}
	m := p.mount
	m.mu.Lock()
	m.by = by
	m.mu.Unlock()
	return m.setSize(p.budget.Load() * PageSize)
}

// MountFD is the number of the mount's descriptor, good until Close; -1: the pool is memory files.
func (p *Pool) MountFD() int {
	if p.mount == nil {
		return -1
	}
	return p.mount.fd
}

// SetMountSize changes the limit of a tmpfs, in bytes; ctlfd is of fspick(2) for it, -1: it is made here. Needs CAP_SYS_ADMIN, or to be the owner of the user namespace that the
// tmpfs was made in. A ctlfd whose use failed is of no use any more.
func SetMountSize(mountfd, ctlfd int, size int64) error {
	m := mount{fd: mountfd, ctl: ctlfd}
	if ctlfd < 0 {
		fd, err := fspick(mountfd)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		m.ctl = fd
	}
	return m.set(size)
}

func fspick(mountfd int) (int, error) {
	fd, err := unix.Fspick(mountfd, "", unix.FSPICK_CLOEXEC|unix.FSPICK_EMPTY_PATH)
	if err != nil {
		return -1, fmt.Errorf("fspick tmpfs: %w", err)
	}
	return fd, nil
}

// setSize changes the limit, in bytes. EBUSY: more is in use.
func (m *mount) setSize(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	// A fd whose reconfiguration failed is of no use any more, so it is not spent on what the kernel will refuse, and made anew once.
	for retry := true; ; retry = false {
		used, err := m.usage()
		if err != nil {
			return err
		}
		if used > size {
			return fmt.Errorf("%d bytes of tmpfs are in use: %w (page out first)", used, unix.EBUSY)
		}
		if m.by != nil {
			return m.by(m.fd, m.ctl, size)
		}
		if m.ctl < 0 {
			if m.ctl, err = m.pick(m.fd); err != nil {
				m.ctl = -1
				return err
			}
		}
		if err = m.reconfigure(size); err == nil || !retry {
			return err
		}
	}
}

// reconfigure needs mu and a fd of fspick, and closes it if it fails.
func (m *mount) reconfigure(size int64) error {
	err := m.set(size)
	if err != nil {
		unix.Close(m.ctl)
		m.ctl = -1
	}
	return err
}

func (m *mount) set(size int64) error {
	err := unix.FsconfigSetString(m.ctl, "size", strconv.FormatInt(size, 10))
	if err == nil {
		if err = unix.FsconfigReconfigure(m.ctl); err == nil {
			return nil
		}
	}
	return fsError(m.ctl, "set size of tmpfs to "+strconv.FormatInt(size, 10), err)
}

func (m *mount) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctl >= 0 {
		unix.Close(m.ctl)
		m.ctl = -1
	}
	if err := unix.Close(m.fd); err != nil {
		return fmt.Errorf("close tmpfs: %w", err)
	}
	return nil
}

// fsError adds what the kernel says about a failed call on a file system context.
func fsError(fs int, what string, err error) error {
	if s := drain(fs); s != "" {
		return fmt.Errorf("%s: %w (kernel: %s)", what, err, s)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// drain reads the messages of a file system context.
func drain(fs int) string {
	var all []byte
	for b := make([]byte, 512); ; {
		n, err := unix.Read(fs, b) // ENODATA: no more
		if err != nil || n <= 0 {
			return string(all)
		}
		if len(all) > 0 {
			all = append(all, "; "...)
		}
		all = append(all, bytes.TrimSpace(b[:n])...)
	}
}
