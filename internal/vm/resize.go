package vm

import (
	"context"
	"fmt"

	"machpager/internal/failpoint"
	"machpager/pager/emm"
)

// SetSize makes the object n bytes long, rounded up to whole pages, at most what it was made with (default_pager_object_set_size). Growing is free. What
// lies beyond a smaller size is discarded, and a touch there is a memory error until it grows again: then it reads as zeros.
func (o *Object) SetSize(ctx context.Context, n int64) error {
	if n < 0 || n > o.size {
		return fmt.Errorf("set size of object: %d bytes: want 0 to %d, which it was made with: %w", n, o.size, emm.InvalidArgument)
	}
	if !o.gate.enter() {
		return fmt.Errorf("set size of object: %w", emm.InvalidObject)
	}
	defer o.gate.leave()
	o.resizeMu.Lock()
	defer o.resizeMu.Unlock()
	pages := (n + o.pageSize - 1) >> o.shift
	old := o.limit.Swap(pages)
	failpoint.Here("resize.limit")
	if pages >= old {
		return nil
	}
	if err := o.Discard(ctx, pages<<o.shift, (old-pages)<<o.shift); err != nil {
		o.limit.Store(old) // what could not be forgotten must not come back as something new
		return fmt.Errorf("set size of object: %w", err)
	}
	failpoint.Here("resize.discarded")
	return nil
}
