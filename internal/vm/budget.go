package vm

import (
	"context"
	"fmt"
	"time"

	"machpager/pager/emm"
)

// smallestBudget is four pages of 4 KiB and four more: what one instruction may need while another is served.
const smallestBudget = 8 * frameSize

// SetBudget changes the bytes that all resident pages together may occupy. A smaller budget is in force when it returns: pages were paged out first. What is
// wired cannot be: then it waits until ctx ends. The objects' minima must fit: KERN_RESOURCE_SHORTAGE.
func (v *VM) SetBudget(ctx context.Context, bytes int64) error {
	bytes &^= frameSize - 1
	if bytes < smallestBudget {
		return fmt.Errorf("set the budget: %d bytes: want at least %d: %w", bytes, smallestBudget, emm.InvalidArgument)
	}
	for {
		old := v.frames.Budget()
		allowed, err := v.setFrames(bytes)
		if err == nil {
			v.policy.Resize(bytes / frameSize)
			v.kickNow()
			return nil
		}
		if bytes >= old || !allowed {
			return fmt.Errorf("set the budget: %w", err)
		}
		v.wanted.Add((old - bytes) / frameSize)
		v.kickNow()
		select {
		case <-ctx.Done():
			v.wanted.Add(-(old - bytes) / frameSize)
			return fmt.Errorf("set the budget: %w; still in use: %w", ctx.Err(), err)
		case <-time.After(time.Millisecond):
		}
		v.wanted.Add(-(old - bytes) / frameSize)
	}
}
