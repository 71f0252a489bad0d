//go:build linux

package region

import (
	"context"

	"machpager/internal/ipc"
	"machpager/pager/emm"
)

// RightOptions say what a right is not to give.
type RightOptions struct {
	// ReadOnly: the object can only be mapped read-only, the memory cannot be made writable, nor can the file behind it be written, mapped writable or cut short. It includes NoResize.
	ReadOnly bool
	// NoResize: SetSize is refused.
	NoResize bool
}

// Right makes a port that gives less than this Object does, to be handed to others: whoever presents it to ObjectOpen gets an Object with that right. At least one thing must be
// left out; the port gives no more than this Object does in any case. An object has at most 32 such ports: emm.ResourceShortage. They end with the object, or with Revoke. What a
// read-only right is worth against processes of the pager's own user, docs/security.md says.
func (o *Object) Right(ctx context.Context, opt *RightOptions) (emm.Port, error) {
	q := ipc.ObjectRight{Handle: o.handle}
	if opt != nil && opt.ReadOnly {
		q.Flags |= ipc.RightReadOnly
	}
	if opt != nil && opt.NoResize {
		q.Flags |= ipc.RightNoResize
	}
	if q.Flags == 0 {
		return emm.Port{}, invalid("make right: nothing is left out: hand on Port itself")
	}
	m, err := o.pager.link.Call(ctx, ipc.TypeObjectRight, q, nil)
	if err != nil {
		return emm.Port{}, o.pager.failed("make right", err)
	}
	defer m.Close()
	r, _, err := ipc.Decode[ipc.ObjectRightReply](m.Body)
	if err != nil {
		return emm.Port{}, o.pager.failed("make right", err)
	}
	return r.Port, nil
}

// Revoke takes back what Right made, from whoever has it: the port opens nothing any more, every call on an Object that was opened by it fails with emm.NoAccess, and a touch of a Region that was
// mapped by it is a fault that ends with SIGBUS (a *FaultError under Guard). For who has the full right: emm.NoAccess for others. All pages of the object are paged out once, so that none is left in those
// Regions. It cannot take back what was read before. A port that Right did not make for this object: emm.InvalidArgument.
func (o *Object) Revoke(ctx context.Context, port emm.Port) error {
	m, err := o.pager.link.Call(ctx, ipc.TypeObjectRevoke, ipc.ObjectRevoke{Handle: o.handle, Port: port}, nil)
	if err != nil {
		return o.pager.failed("revoke right", err)
	}
	m.Close()
	return nil
}
