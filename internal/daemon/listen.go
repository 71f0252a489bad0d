package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// listen makes the socket that tasks connect to: for this user alone, or with group also for the members of that group. A socket that a dead pager
// left is replaced; one where somebody answers is not.
func listen(path, group string) (*net.UnixListener, error) {
	gid := -1
	if group != "" {
		var err error
		if gid, err = groupID(group); err != nil {
			return nil, fmt.Errorf("listen at %s: %w", path, err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen at %s: %w%s", path, err, listenHint(err))
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("listen at %s: there is a file that is no socket: %w", path, unix.EEXIST)
		}
		if c, err := net.Dial("unixpacket", path); err == nil {
			c.Close()
			return nil, fmt.Errorf("listen at %s: another pager listens there: %w (stop it, or choose another socket)", path, unix.EADDRINUSE)
		} else if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("listen at %s: look whether another pager listens there: %w", path, err)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("listen at %s: remove what a dead pager left: %w", path, err)
		}
	}
	// The mode must be right from the first instant. The mask is the process's; nobody else makes files at this time.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w%s", path, err, listenHint(err))
	}
	if gid >= 0 {
		err = os.Chown(path, -1, gid)
		if err == nil {
			err = os.Chmod(path, 0o660)
		}
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("listen at %s: give it to group %s: %w", path, group, err)
		}
	}
	return l, nil
}

// listenAt takes connections of a socket that listens already. It is whose who made it: it is not removed at the end.
func listenAt(f *os.File) (*net.UnixListener, error) {
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("listen at the socket that was passed on: %w", err)
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("listen at the socket that was passed on: it is no unix socket: %w", unix.EPROTOTYPE)
	}
	ul.SetUnlinkOnClose(false)
	return ul, nil
}

// listenHint is the remedy for a socket that cannot be made.
func listenHint(err error) string {
	if errors.Is(err, os.ErrPermission) {
		return " (name a socket in a directory of yours with --socket, or run as root)"
	}
	return ""
}

func groupID(name string) (int, error) {
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return -1, err
	}
	return strconv.Atoi(g.Gid)
}
