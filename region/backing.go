//go:build linux

package region

import (
	"context"
	"path/filepath"

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
// there too. "": the directory that the pager was started with. The file has no name and is gone with the pager. Its number is returned. For the pager's own user
// and root: unix.EPERM for others. Paging space that is not files: unix.EOPNOTSUPP.
func (p *Pager) BackingStoreCreate(ctx context.Context, dir string, o *BackingStoreOptions) (id int, err error) {
	if o == nil {
		o = &BackingStoreOptions{}
	}
	if o.Capacity < 0 || o.Preallocate && o.Capacity == 0 {
		return 0, invalid("create paging file: capacity of %d bytes, preallocated %v: want what to preallocate", o.Capacity, o.Preallocate)
	}
	if dir != "" {
		if dir, err = filepath.Abs(dir); err != nil { // the pager lives elsewhere
			return 0, p.failed("create paging file", err)
		}
	}
	q := ipc.BackingStoreCreate{Capacity: o.Capacity, Priority: o.Priority}
	if o.Preallocate {
		q.Flags = ipc.BackingStorePreallocate
	}
	if err := p.begin(); err != nil {
		return 0, p.failed("create paging file", err)
	}
	defer p.making.Done()
	m, err := p.link.Call(ctx, ipc.TypeBackingStoreCreate, q, &ipc.CallOptions{Tail: []byte(dir), Late: p.lateBackingStore})
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
