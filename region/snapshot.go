//go:build linux

package region

import (
	"context"

	"machpager/internal/ipc"
)

// Snapshot makes a new object with the contents that this one has at one instant, in all tasks that map it: if a write is in it, so is every write that came
// before, by any thread of any task. Both objects can be written afterwards, and neither sees the other's changes.
//
// It pages no memory in and copies no stored page: it takes time in proportion to the dirty pages in memory, which are written to paging space, plus 8 bytes for each
// page there. Paging space holds what both have only once, until one of them changes it. Meanwhile first writes to clean pages wait; reads do not.
//
// The new object has the same size and page size and a port of its own, also if this one is private. It lives like one of ObjectCreate, until its last right and
// mapping. Errors: emm.InvalidArgument if the object is not the default pager's, or was set to size 0, and, with nothing made, those of PageOut.
func (o *Object) Snapshot(ctx context.Context) (*Object, error) {
	const what = "snapshot of object"
	if o.isClosed() {
		return nil, o.pager.failed(what, ErrClosed)
	}
	if err := o.pager.begin(); err != nil {
		return nil, o.pager.failed(what, err)
	}
	defer o.pager.making.Done()
	m, err := o.pager.link.Call(ctx, ipc.TypeObjectSnapshot, ipc.ObjectSnapshot{Handle: o.handle}, &ipc.CallOptions{Late: o.pager.lateObject})
	if err != nil {
		return nil, o.pager.failed(what, err)
	}
	return o.pager.adopt(what, m)
}
