package daemon

import (
	"context"
	"fmt"

	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/pager/emm"
)

// StateVersion is the version of all that one pager leaves to the next: which items the guardian holds and what their words mean, and the layouts in
// memory and in files. Whoever changes any of that counts it up: a pager of another version then refuses to take over, and an upgrade to it is refused
// while the old pager still serves.
const StateVersion = 1

// acceptsState reports whether this program can take over what a pager has left that says this of it.
func acceptsState(state guardian.Item) error {
	if state.A != StateVersion {
		return fmt.Errorf("take over from another pager: its state is of version %d (%s), this program (%s) reads version %d: %w", state.A, state.Tail, Version,
			StateVersion, emm.InvalidArgument)
	}
	return nil
}

// tellState has the guardian know what kind of state this pager leaves.
func (d *Daemon) tellState(ctx context.Context) error {
	return d.guardian.Put(ctx, guardian.Item{Kind: ipc.ItemState, A: StateVersion, Tail: []byte(Version)})
}

// upgrade has the guardian replace this pager. It succeeds in another process: the one that finds the request sent again.
func (s *session) upgrade(ctx context.Context, m *ipc.Message) error {
	if err := s.operator(); err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	if m.Resent() {
		return nil
	}
	s.log.Info("upgrade asked for")
	return s.d.guardian.Replace(ctx)
}
