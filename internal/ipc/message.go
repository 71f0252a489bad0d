package ipc

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Message is one frame as it came, with its file descriptors. Not for concurrent use.
type Message struct {
	Header
	Body []byte // fixed part and tail
	fds  []int  // -1: taken
}

// NumFDs is how many file descriptors came.
func (m *Message) NumFDs() int { return len(m.fds) }

// FD is the i-th file descriptor, still the message's; -1 if there is none.
func (m *Message) FD(i int) int {
	if i >= len(m.fds) {
		return -1
	}
	return m.fds[i]
}

// TakeFD hands the i-th file descriptor over to the caller; -1 if there is none or it was taken.
func (m *Message) TakeFD(i int) int {
	fd := m.FD(i)
	if fd >= 0 {
		m.fds[i] = -1
	}
	return fd
}

// Close closes the file descriptors that were not taken. Idempotent.
func (m *Message) Close() {
	for i := range m.fds {
		if fd := m.TakeFD(i); fd >= 0 {
			unix.Close(fd)
		}
	}
}

// check holds the message against what its type promises in its direction, the kinds of its fds included.
func (m *Message) check(s Shape) error {
	if err := s.check(m.Type, m.Body, len(m.fds)); err != nil {
		return err
	}
	for i, fd := range m.fds {
		if err := CheckKind(fd, s.Kind); err != nil {
			return fmt.Errorf("%v: file descriptor %d: %w", m.Type, i, err)
		}
	}
	return nil
}

// CheckKind verifies what a received file descriptor is.
func CheckKind(fd int, k Kind) error {
	if k == KindAny {
		return nil
	}
	if k == KindUffd {
		buf := make([]byte, 64)
		n, err := unix.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd), buf)
		if err != nil {
			return fmt.Errorf("tell whether it is a userfaultfd: read link in /proc/self/fd: %w", err)
		}
		if name := string(buf[:n]); name != "anon_inode:[userfaultfd]" {
			return fmt.Errorf("want a userfaultfd, got %q: %w", name, ErrMalformed)
		}
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	mode, want := st.Mode&unix.S_IFMT, ""
	switch k {
	case KindFile:
		if mode != unix.S_IFREG && mode != unix.S_IFBLK {
			want = "a regular file or a block device"
		}
	case KindDevice:
		if mode != unix.S_IFCHR {
			want = "a character device"
		}
	case KindSocket:
		if mode != unix.S_IFSOCK {
			want = "a socket"
		}
	}
	if want != "" {
		return fmt.Errorf("want %s, got a file of mode %#o: %w", want, st.Mode, ErrMalformed)
	}
	return nil
}
