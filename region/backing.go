//go:build linux

package region

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
)

// BackingStoreOptions are the options of BackingStoreCreate. nil and zero values mean the defaults.
type BackingStoreOptions struct {
	Capacity    int64 // bytes, rounded down to whole pages of 4096; 0: what the file system has
	Priority    int32 // files of a higher priority are used first, those of the same in turn; the file the pager began with has 0
	Preallocate bool  // take the file system's space for all of Capacity now, so that no page-out fails for lack of it
}

// BackingStore describes a paging file of the pager. Counts are since it was added.
type BackingStore struct {
	ID          int    `json:"id"`            // 1 to 254; reused when the file is removed
	Dir         string `json:"dir"`           // where it is, without a name
	Priority    int    `json:"priority"`      // files of a higher one are used first
	Leaving     bool   `json:"leaving"`       // it is being removed
	Total       int64  `json:"total_bytes"`   // what it can hold
	Used        int64  `json:"used_bytes"`    // what it holds
	Free        int64  `json:"free_bytes"`    // what it can take
	Read        int64  `json:"read_bytes"`    // page-in, and moves to other files
	Written     int64  `json:"written_bytes"` // page-out, and moves from other files
	ReadErrors  int64  `json:"read_errors"`   // operations
	WriteErrors int64  `json:"write_errors"`  // operations, those included that found the file system full
}

// BackingStoreCreate adds a paging file in the directory dir to the pager's paging space (default_pager_backing_store_create): from then on pages that are paged out go
// there too. "": the directory of the first one there is. The file has no name and is gone with the pager. It is made here, with the rights of the caller, for the pager
// itself opens nothing by name. Its number is returned. For the pager's own user
// and root: unix.EPERM for others. Paging space that is not files: unix.EOPNOTSUPP.
func (p *Pager) BackingStoreCreate(ctx context.Context, dir string, o *BackingStoreOptions) (id int, err error) {
	if o == nil {
		o = &BackingStoreOptions{}
	}
	if o.Capacity < 0 || o.Preallocate && o.Capacity == 0 {
		return 0, invalid("create paging file: capacity of %d bytes, preallocated %v: want what to preallocate", o.Capacity, o.Preallocate)
	}
	if dir == "" {
		if dir, err = p.firstBackingDir(ctx); err != nil {
			return 0, err
		}
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return 0, p.failed("create paging file", err)
	}
	f, err := createPagingFile(dir)
	if err != nil {
		return 0, p.failed("create paging file in "+dir, err)
	}
	defer f.Close()
	q := ipc.BackingStoreCreate{Capacity: o.Capacity, Priority: o.Priority}
	if o.Preallocate {
		q.Flags = ipc.BackingStorePreallocate
	}
	if err := p.begin(); err != nil {
		return 0, p.failed("create paging file", err)
	}
	defer p.making.Done()
	m, err := p.link.Call(ctx, ipc.TypeBackingStoreCreate, q, &ipc.CallOptions{Tail: []byte(dir), FDs: []int{int(f.Fd())}, Late: p.lateBackingStore})
	if err != nil {
		return 0, p.failed("create paging file", err)
	}
	defer m.Close()
	r, _, err := ipc.Decode[ipc.BackingStore](m.Body)
	if err != nil {
		return 0, p.failed("create paging file", err)
	}
	return int(r.ID), nil
}

// firstBackingDir is where the first paging file is.
func (p *Pager) firstBackingDir(ctx context.Context) (string, error) {
	list, err := p.BackingStores(ctx)
	if err != nil {
		return "", err
	}
	if len(list) == 0 {
		return "", p.failed("create paging file", fmt.Errorf("the pager has none yet, or paging space that is no files: %w", unix.EOPNOTSUPP))
	}
	return list[0].Dir, nil
}

// createPagingFile makes a file without a name: by O_TMPFILE, or where the file system lacks that by unlinking it.
func createPagingFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC|unix.O_EXCL, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "(paging file)")), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("%w (name another directory)", err)
	}
	f, err := os.CreateTemp(dir, "paging.*")
	if err != nil {
		return nil, fmt.Errorf("%w (name another directory)", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// lateBackingStore takes back what was added for a caller that had gone.
func (p *Pager) lateBackingStore(m *ipc.Message) {
	if r, _, err := ipc.Decode[ipc.BackingStore](m.Body); err == nil {
		p.undo(ipc.TypeBackingStoreDelete, r)
	}
}

// BackingStoreDelete removes a paging file (default_pager_backing_store_delete). Its contents are moved to the others first, while tasks go on. If they have no room
// (emm.NoSpace), fail, or ctx ends, the file stays in use; nothing is lost either way. A number that no file has: unix.ENOENT. For the pager's own user and root:
// unix.EPERM for others.
func (p *Pager) BackingStoreDelete(ctx context.Context, id int) error {
	if id < 1 || id > 254 {
		return invalid("delete paging file %d: want a number from 1 to 254", id)
	}
	m, err := p.link.Call(ctx, ipc.TypeBackingStoreDelete, ipc.BackingStore{ID: uint32(id)}, nil)
	if err != nil {
		return p.failed("delete paging file", err)
	}
	m.Close()
	return nil
}

// BackingStores lists the paging files by number (default_pager_backing_store_info). None if paging space is not files. Those that come or go meanwhile may be missed.
func (p *Pager) BackingStores(ctx context.Context) ([]BackingStore, error) {
	list, after := []BackingStore{}, uint32(0)
	for {
		m, err := p.link.Call(ctx, ipc.TypeBackingStoreInfo, ipc.BackingStore{ID: after}, nil)
		if err != nil {
			return nil, p.failed("list paging files", err)
		}
		r, tail, err := ipc.Decode[ipc.BackingStoreInfoReply](m.Body)
		m.Close()
		if err != nil {
			return nil, p.failed("list paging files", err)
		}
		if r.ID <= after { // 0: no more
			return list, nil
		}
		after = r.ID
		list = append(list, BackingStore{ID: int(r.ID), Dir: string(tail), Priority: int(r.Priority), Leaving: r.Leaving != 0, Total: r.Total, Used: r.Used, Free: r.Free,
			Read: r.Read, Written: r.Written, ReadErrors: r.ReadErrors, WriteErrors: r.WriteErrors})
	}
}
