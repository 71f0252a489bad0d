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
// wired cannot be: then it waits until ctx ends, and the budget is again what it was. Meanwhile it shrinks with every frame that is free. One call at a time changes it. The
// objects' minima must fit: KERN_RESOURCE_SHORTAGE.
func (v *VM) SetBudget(ctx context.Context, bytes int64) error {
	bytes &^= frameSize - 1
	if bytes < smallestBudget {
		return fmt.Errorf("set the budget: %d bytes: want at least %d: %w", bytes, smallestBudget, emm.InvalidArgument)
	}
	v.budgetMu.Lock()
	defer v.budgetMu.Unlock()
	first := v.frames.Budget()
	for {
		now := v.frames.Budget()
		allowed, err := v.setFrames(bytes)
		if err == nil {
			v.policy.Resize(bytes / frameSize)
			v.kickNow()
			return nil
		}
		if bytes >= now || !allowed {
			v.setFrames(first)
			return fmt.Errorf("set the budget: %w", err)
		}
		// What is free is taken at once: the whole difference may never be free at one time, when others fill as fast as pages go.
		if free := v.freeFrames() * frameSize; free > 0 {
			v.setFrames(max(bytes, now-free)) // an error: somebody was faster
			now = v.frames.Budget()
		}
		want := (now - bytes) / frameSize
		v.wanted.Add(want)
		v.kickNow()
		select {
		case <-ctx.Done():
			v.wanted.Add(-want)
			v.setFrames(first)
			v.kickDeferred()
			return fmt.Errorf("set the budget: %w; still in use: %w", ctx.Err(), err)
		case <-time.After(time.Millisecond):
		}
		v.wanted.Add(-want)
	}
}
