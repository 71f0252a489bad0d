package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCheckPagingFile: only an empty file that nobody can find, open for both ways and nothing strange, becomes paging space.
func TestCheckPagingFile(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		name string
		make func() (int, error)
		ok   bool
	}{
		{"as it should be", func() (int, error) { return unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o600) }, true},
		{"write-only", func() (int, error) { return unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY, 0o600) }, false},
		{"appending", func() (int, error) { return unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_APPEND, 0o600) }, false},
		{"named", func() (int, error) { return unix.Open(filepath.Join(dir, "name"), unix.O_CREAT|unix.O_RDWR, 0o600) }, false},
		{"read-only", func() (int, error) { return unix.Open("/proc/self/exe", unix.O_RDONLY, 0) }, false},
		{"a directory", func() (int, error) { return unix.Open(dir, unix.O_RDONLY, 0) }, false},
		{"a name alone", func() (int, error) { return unix.Open(filepath.Join(dir, "name"), unix.O_PATH, 0) }, false},
		{"a device", func() (int, error) { return unix.Open(os.DevNull, unix.O_RDWR, 0) }, false},
		{"a pipe", func() (int, error) {
			var p [2]int
			err := unix.Pipe(p[:])
			unix.Close(p[1])
			return p[0], err
		}, false},
		{"not empty", func() (int, error) {
			fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o600)
			if err == nil {
				_, err = unix.Write(fd, []byte("x"))
			}
			return fd, err
		}, false},
	} {
		fd, err := c.make()
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if err := checkPagingFile(fd); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		unix.Close(fd)
	}
}
