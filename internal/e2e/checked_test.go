package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["checked"] = withPager(checkedObject)
	tasks["checkedtorn"] = withPager(checkedTorn)
	tasks["checkedkilled"] = checkedKilled
}

func TestChecked(t *testing.T)       { run(t, "checked", nil, nil, nil) }
func TestCheckedTorn(t *testing.T)   { run(t, "checkedtorn", nil, nil, nil) }
func TestCheckedKilled(t *testing.T) { run(t, "checkedkilled", nil, nil, nil) }

// tempPath is a name in a directory of its own, which remove takes away.
func tempPath() (path string, remove func(), err error) {
	dir, err := os.MkdirTemp("", "e2e-checked")
	return filepath.Join(dir, "file"), func() { os.RemoveAll(dir) }, err
}

// mapChecked opens the file and maps an object over it; the file is the pager's alone.
func mapChecked(ctx context.Context, p *region.Pager, path string, size int64, flags int, o region.ObjectOptions, m *region.MapOptions) (*region.Object, *region.Region, error) {
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	o.Manager, o.File = "checked", f
	return create(ctx, p, size, &o, m)
}

// checkedObject makes a file, changes its object in every way, and opens it again.
func checkedObject(ctx context.Context, p *region.Pager) error {
	const size = 3<<20 + 100
	want := make([]byte, size)
	for i, o := range []region.ObjectOptions{{}, {ClusterSize: 256 << 10}, {PageSize: 64 << 10}, {PageSize: 2 << 20}} {
		path, remove, err := tempPath()
		if err != nil {
			return err
		}
		defer remove()
		object, r, err := mapChecked(ctx, p, path, size, os.O_RDWR|os.O_CREATE, o, nil)
		if err != nil {
			return err
		}
		clear(want)
		if err := sameBytes("a new file", r.Bytes(), want); err != nil {
			return err
		}
		fill(want, 0, uint64(i))
		clear(want[1<<20 : 2<<20])
		copy(r.Bytes(), want)
		if err := firstOf(r.Sync(ctx, 4090, size-4090), r.PageOut(ctx, 0, size), sameBytes("paged out", r.Bytes(), want)); err != nil {
			return err
		}
		if _, err := object.Snapshot(ctx); !errors.Is(err, emm.InvalidArgument) {
			return fmt.Errorf("snapshot: %w", err)
		}
		if i == 0 { // it takes a second
			if _, _, err := mapChecked(ctx, p, path, 0, os.O_RDWR, o, nil); !errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("a second object of the file: %w", err)
			}
		}
		if err := object.SetSize(ctx, 1000); err != nil {
			return err
		}
		if err := object.SetSize(ctx, size); err != nil {
			return err
		}
		clear(want[max(4096, o.PageSize):]) // the page that the size ended in stays
		copy(r.Bytes()[size-3:], "end")
		copy(want[size-3:], "end")
		if err := firstOf(sameBytes("shrunk and grown", r.Bytes(), want), r.Close(), object.Close()); err != nil {
			return err
		}
		object, r, err = mapChecked(ctx, p, path, 0, os.O_RDONLY, o, &region.MapOptions{ReadOnly: true})
		if err != nil {
			return err
		}
		if err := firstOf(sameBytes("read-only", r.Bytes(), want), r.Sync(ctx, 0, size), r.Close(), object.Close()); err != nil {
			return err
		}
		object, r, err = mapChecked(ctx, p, path, size+8<<20, os.O_RDWR, o, nil)
		if err != nil {
			return err
		}
		if err := firstOf(sameBytes("larger", r.Bytes()[:size], want), sameBytes("its end", r.Bytes()[size:], make([]byte, r.Size()-size)), r.Close(), object.Close()); err != nil {
			return err
		}
	}
	return checkedRefused(ctx, p)
}

// checkedRefused gives files that are none.
func checkedRefused(ctx context.Context, p *region.Pager) error {
	path, remove, err := tempPath()
	if err != nil {
		return err
	}
	defer remove()
	for contents, says := range map[string]string{"": "empty", "a plain file": "manager \"file\""} {
		if err := os.WriteFile(path, []byte(contents), 0o600); err != nil {
			return err
		}
		if _, _, err := mapChecked(ctx, p, path, 0, os.O_RDWR, region.ObjectOptions{}, nil); err == nil || !strings.Contains(err.Error(), says) {
			return fmt.Errorf("file with %q: %w", contents, err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != contents {
			return fmt.Errorf("the file was changed: %q, %w", b, err)
		}
	}
	if _, err := p.ObjectCreate(ctx, 4096, &region.ObjectOptions{Manager: "checked"}); !errors.Is(err, emm.InvalidArgument) {
		return fmt.Errorf("no file: %w", err)
	}
	return nil
}

// checkedTorn damages a page in the file. It is an error, its neighbours are not, and Discard heals it.
func checkedTorn(ctx context.Context, p *region.Pager) error {
	const size, torn = 64 * 4096, 20 * 4096
	path, remove, err := tempPath()
	if err != nil {
		return err
	}
	defer remove()
	_, r, err := mapChecked(ctx, p, path, size, os.O_RDWR|os.O_CREATE, region.ObjectOptions{}, nil)
	if err != nil {
		return err
	}
	want := make([]byte, size)
	fill(want, 0, 5)
	copy(r.Bytes(), want)
	if err := firstOf(r.Sync(ctx, 0, size), r.PageOut(ctx, 0, size)); err != nil {
		return err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	at := bytes.Index(b, want[torn:torn+4096])
	if at < 0 {
		return errors.New("the page is not in the file")
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(want[:2048], int64(at)+2048); firstOf(err, f.Close()) != nil { // half of it is another page's
		return err
	}
	var fault *region.FaultError
	err = region.Guard(func() error { fault = nil; b[0] = r.Bytes()[torn+100]; return nil })
	if !errors.As(err, &fault) || !errors.Is(err, emm.MemoryError) {
		return fmt.Errorf("a touch of a torn page: %w", err)
	}
	if _, err := r.ReadAt(b[:4096], torn); !errors.As(err, &fault) || !errors.Is(err, emm.MemoryError) {
		return fmt.Errorf("ReadAt of a torn page: %w", err)
	}
	if err := firstOf(sameBytes("before it", r.Bytes()[:torn], want[:torn]), sameBytes("behind it", r.Bytes()[torn+4096:], want[torn+4096:])); err != nil {
		return err
	}
	if err := r.Discard(ctx, torn, 4096); err != nil {
		return err
	}
	clear(want[torn:][:4096])
	if err := sameBytes("discarded", r.Bytes(), want); err != nil {
		return err
	}
	fill(want[torn:][:4096], 0, 6)
	copy(r.Bytes()[torn:], want[torn:][:4096])
	return firstOf(r.Sync(ctx, 0, size), r.PageOut(ctx, 0, size), sameBytes("healed", r.Bytes(), want), r.Close())
}

// checkedKilled has its pager killed while pages go out and are synchronised: the next one goes on with the file.
func checkedKilled(*conn) error {
	ctx := context.Background()
	p, err := startPager(ctx, spawn.Options{Resident: 1 << 20, Restarts: 100})
	if err != nil {
		return err
	}
	defer p.Close()
	path, remove, err := tempPath()
	if err != nil {
		return err
	}
	defer remove()
	const size = 4 << 20
	object, r, err := mapChecked(ctx, p, path, size, os.O_RDWR|os.O_CREATE, region.ObjectOptions{}, nil)
	if err != nil {
		return err
	}
	want := make([]byte, size)
	for v := range uint64(8) {
		killed := make(chan error, 1)
		go func() {
			time.Sleep(time.Duration(v) * 7 * time.Millisecond)
			_, err := killPager(ctx, p)
			killed <- err
		}()
		fill(want, 0, v+1)
		for off := int64(0); off < size; off += 256 << 10 {
			copy(r.Bytes()[off:], want[off:off+256<<10])
			if v%2 == 0 {
				if err := r.Sync(ctx, off, 256<<10); err != nil {
					return fmt.Errorf("kill %d: %w", v, err)
				}
			}
		}
		if err := firstOf(<-killed, sameBytes(fmt.Sprintf("after kill %d", v), r.Bytes(), want)); err != nil {
			return err
		}
	}
	if err := firstOf(r.Sync(ctx, 0, size), r.Close(), object.Close()); err != nil {
		return err
	}
	_, r, err = mapChecked(ctx, p, path, 0, os.O_RDWR, region.ObjectOptions{}, nil)
	if err != nil {
		return err
	}
	return firstOf(sameBytes("in the file", r.Bytes(), want), r.Close(), p.Close())
}
