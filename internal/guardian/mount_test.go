package guardian

import (
	"errors"
	"log/slog"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"machpager/internal/frames"
	"machpager/internal/ipc"
)

// newTmpfs is the descriptor of a mount that is nowhere. This test needs root.
func newTmpfs(t *testing.T) int {
	t.Helper()
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// TestResize: the first tmpfs is the only file system that is ever changed.
func TestResize(t *testing.T) {
	tab := newTable(slog.New(slog.DiscardHandler))
	tab.mount.set = frames.SetMountSize
	a, file, err := ipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	guard := ipc.NewLink(a, &ipc.LinkOptions{Handler: (&supervisor{table: tab}).handler(serving())})
	defer guard.Close()
	c, err := NewClient(file, func() {}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	root, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := c.Resize(t.Context(), int(root.Fd()), -1, 1<<20); !errors.Is(err, unix.EPERM) {
		t.Errorf("what is no tmpfs: %v", err)
	}
	ours, other := newTmpfs(t), newTmpfs(t)
	for _, size := range []int64{8 << 20, 4 << 20} {
		if err := c.Resize(t.Context(), ours, -1, size); err != nil {
			t.Fatal(err)
		}
		var st unix.Statfs_t
		if err := unix.Fstatfs(ours, &st); err != nil || int64(st.Blocks)*st.Bsize != size {
			t.Errorf("%d blocks of %d, %v; want %d bytes", st.Blocks, st.Bsize, err, size)
		}
	}
	for _, q := range []struct {
		fd   int
		size int64
	}{{other, 1 << 20}, {ours, 0}, {ours, -4096}} {
		if err := c.Resize(t.Context(), q.fd, -1, q.size); !errors.Is(err, unix.EPERM) {
			t.Errorf("%+v: %v", q, err)
		}
	}
}

// serving is a pager whose word counts.
func serving() *life {
	l := &life{ready: make(chan struct{}, 1)}
	l.current.Store(true)
	return l
}
