package vm

import (
	"context"
	"fmt"

	"machpager/internal/failpoint"
	"machpager/pager/emm"
)

// Snapshot calls save at an instant of the object's life: everything that was written before is with the manager, nothing that is written after. save has the
// manager make its copy; it must not touch the object.
//
// No page becomes dirty while the object is frozen: a fault that would write is dropped until the end, and everything dirty is cleaned meanwhile, each page
// protected in every mapping before its contents are read. So if a later write is in, so is every earlier one that it can depend on: a write that is not in waits for the
// end, and what its thread would do afterwards, or another would that saw it, with it. It takes time in proportion to the resident dirty pages; readers go on.
func (o *Object) Snapshot(ctx context.Context, save func(port emm.Port) error) error {
	if !o.gate.enter() {
		return fmt.Errorf("snapshot: %w", emm.InvalidObject)
	}
	defer o.gate.leave()
	if err := o.ready(); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	b := o.binding.Load()
	if b == nil {
		var err error
		if b, err = o.adoptManager(); err != nil {
			return fmt.Errorf("snapshot: %w", err)
		}
	}
	o.freeze.Lock()
	defer func() {
		o.freeze.Unlock()
		o.wake(0, o.npages())
	}()
	failpoint.Here("snapshot.frozen")
	if err := o.lockRange(ctx, 0, o.npages(), emm.ReturnAll, false); err != nil {
		return fmt.Errorf("snapshot: clean the object: %w", err)
	}
	failpoint.Here("snapshot.clean")
	if err := save(b.port); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	failpoint.Here("snapshot.saved")
	return nil
}
