package storetest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"machpager/internal/arena"
	"machpager/pager/store"
)

// Lasting is what outlives a process that has a store: memories and files, by name.
type Lasting struct {
	memories, files []string // their names
	held            []*os.File
	dir             string
}

// kind and version of the memories.
const (
	lastingKind, lastingVersion = "storetst", 1
	lastingMost                 = 1 << 30
)

// newLasting makes the memories and files, empty.
func newLasting(t testing.TB, memories, files []string) *Lasting {
	t.Helper()
	l := &Lasting{memories: memories, files: files, dir: t.TempDir()}
	t.Cleanup(l.close)
	for _, name := range memories {
		a, err := arena.Create("storetest-"+name, lastingKind, lastingVersion, lastingMost)
		if err != nil {
			t.Fatal(err)
		}
		f, err := dup(a.File())
		if err = errors.Join(err, a.Close()); err != nil {
			t.Fatal(err)
		}
		l.held = append(l.held, f)
	}
	for range files {
		f, err := unnamed(l.dir)
		if err != nil {
			t.Fatal(err)
		}
		l.held = append(l.held, f)
	}
	return l
}

// inherited is what a parent process handed over, from descriptor first on.
func inherited(first int, memories, files []string) *Lasting {
	l := &Lasting{memories: memories, files: files}
	for i := range len(memories) + len(files) {
		unix.CloseOnExec(first + i)
		l.held = append(l.held, os.NewFile(uintptr(first+i), fmt.Sprintf("lasting %d", i)))
	}
	return l
}

func (l *Lasting) close() {
	for _, f := range l.held {
		f.Close()
	}
}

func unnamed(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create file in %s: %w", dir, err)
	}
	return os.NewFile(uintptr(fd), dir), nil
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// Memory is the memory of this name, which is closed when it is closed, and there still.
func (l *Lasting) Memory(name string) (store.Memory, error) {
	f, err := dup(l.held[slices.Index(l.memories, name)])
	if err != nil {
		return nil, err
	}
	a, err := arena.Open(f, lastingKind, lastingVersion, lastingMost)
	if err != nil {
		f.Close()
		return nil, err
	}
	return a, nil
}

// File is the file of this name, which may be closed, and is there still.
func (l *Lasting) File(name string) (*os.File, error) {
	return dup(l.held[len(l.memories)+slices.Index(l.files, name)])
}

// copy is all of it as it is at this instant. Nobody may write meanwhile.
func (l *Lasting) copy(t testing.TB) *Lasting {
	t.Helper()
	c := &Lasting{memories: l.memories, files: l.files, dir: l.dir}
	for i, from := range l.held {
		var to *os.File
		var err error
		if i < len(l.memories) {
			var fd int
			if fd, err = unix.MemfdCreate("storetest-copy", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL); err == nil {
				to = os.NewFile(uintptr(fd), "copy")
			}
		} else {
			to, err = unnamed(l.dir)
		}
		if err == nil {
			c.held = append(c.held, to)
			err = copyFile(to, from)
		}
		if err == nil && i < len(l.memories) {
			_, err = unix.FcntlInt(to.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
		}
		if err != nil {
			c.close()
			t.Fatal(err)
		}
	}
	return c
}

// copyFile makes to what from is, where it is not a hole.
func copyFile(to, from *os.File) error {
	st, err := from.Stat()
	if err == nil {
		err = to.Truncate(st.Size())
	}
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for end := int64(0); ; {
		off, err := unix.Seek(int(from.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err == nil {
			end, err = unix.Seek(int(from.Fd()), off, unix.SEEK_HOLE)
		}
		if err != nil {
			return err
		}
		if _, err := io.CopyBuffer(io.NewOffsetWriter(to, off), struct{ io.Reader }{io.NewSectionReader(from, off, end-off)}, buf); err != nil {
			return err
		}
	}
}
