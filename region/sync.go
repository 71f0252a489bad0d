//go:build linux

package region

import (
	"context"

	"machpager/internal/ipc"
)

// Sync hands the pages of a range to the manager, where they were changed (by any task that maps the object), and returns when the manager says that
// they are safe (vm_msync, memory_object_synchronize); bytes, rounded outward to pages. The pages stay in memory. For an object over a file that means: in
// the file, and on its device (fdatasync(2)). The default pager has nothing that outlives the object: there Sync only cleans.
//
// What is written while Sync runs may be part of it or not. An error means that some of the range may not be safe; pages that the manager did not take are
// still there, and are handed over again by the next Sync or page-out. When ctx ends, what was begun goes on.
func (r *Region) Sync(ctx context.Context, off, n int64) error {
	first, size, err := r.pages("sync", off, n)
	if err != nil || n == 0 {
		return err
	}
	m, err := r.call(ctx, "sync", ipc.TypeSync, ipc.Sync{Mapping: r.id, Offset: first, Size: size})
	if err != nil {
		return err
	}
	m.Close()
	return nil
}
