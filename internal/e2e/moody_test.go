package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
	"machpager/pager/vnode"
	"machpager/region"
)

func TestMoodyReader(t *testing.T) { run(t, "moody", nil, nil, nil) }

// moody is a ReaderAt and WriterAt of a user's, whose mood is what a file says at that moment.
type moody struct {
	*os.File
	mood string // path
}

// moods.
const (
	moodEIO   = "eio"
	moodPanic = "panic"
	moodSync  = "sync"
)

func openMoody(_ context.Context, arg string, f *os.File) (emm.Manager, error) {
	size, err := vnode.FileSize(f)
	if err != nil {
		return nil, err
	}
	m := &moody{f, arg}
	return vnode.ReaderWriterAt(m, size, m.sync, nil), nil
}

func (m *moody) now() string {
	b, _ := os.ReadFile(m.mood)
	return string(b)
}

func (m *moody) trouble() error {
	switch m.now() {
	case moodEIO:
		return unix.EIO
	case moodPanic:
		panic("in a bad mood")
	}
	return nil
}

func (m *moody) ReadAt(p []byte, off int64) (int, error) {
	if err := m.trouble(); err != nil {
		return 0, err
	}
	return m.File.ReadAt(p, off)
}

func (m *moody) WriteAt(p []byte, off int64) (int, error) {
	if err := m.trouble(); err != nil {
		return 0, err
	}
	return m.File.WriteAt(p, off)
}

func (m *moody) sync() error {
	if m.now() == moodSync {
		return unix.EIO
	}
	return m.File.Sync()
}

// moodyObject has an object behind a ReaderAt that fails and recovers.
func moodyObject(ctx context.Context, p *region.Pager) error {
	const size = 1 << 20
	b, err := newBacking(size)
	if err != nil {
		return err
	}
	defer b.remove()
	mood := filepath.Join(filepath.Dir(b.Name()), "mood")
	be := func(s string) {
		if err := os.WriteFile(mood, []byte(s), 0o600); err != nil {
			panic(err)
		}
	}
	r, err := p.Allocate(ctx, size, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{Manager: "moody", Arg: mood, File: b.File}})
	if err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for i, bad := range []string{moodEIO, moodPanic} {
		off := int64(i * 8192)
		be(bad)
		if _, err := r.ReadAt(buf, off); !errors.Is(err, emm.MemoryError) {
			return fmt.Errorf("%s: %w", bad, err)
		}
		be("")
		if _, err := r.ReadAt(buf, off); err != nil {
			return fmt.Errorf("after %s: %w", bad, err)
		}
		if err := sameBytes("after "+bad, buf, b.want[off:off+4096]); err != nil {
			return err
		}
		b.put(r, int(off)+100, "changed "+bad)
		be(bad)
		if err := r.Sync(ctx, 0, size); !errors.Is(err, emm.MemoryError) {
			return fmt.Errorf("sync with %s: %w", bad, err)
		}
		be("")
		if err := firstOf(r.Sync(ctx, 0, size), b.check("after "+bad)); err != nil {
			return err
		}
	}
	b.put(r, 77, "not safe at first")
	be(moodSync)
	if err := r.Sync(ctx, 0, size); !errors.Is(err, emm.MemoryError) {
		return fmt.Errorf("a sync that fails: %w", err)
	}
	be("")
	return firstOf(r.Sync(ctx, 0, size), b.check("after a sync that failed"), sameBytes("all", r.Bytes(), b.want), r.Close())
}
