package daemon

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/internal/vm"
	"machpager/pager/emm"
)

// What a task says about which of its pages are to be kept, and how: advice, wiring, discarding, sizes, and the budget of all.

func (s *session) advise(q ipc.Advise) error {
	m, err := s.within("advise", q.Mapping, q.Offset, q.Size)
	if err != nil {
		return err
	}
	if q.Advice > uint32(vm.DontNeed) {
		return fmt.Errorf("advise: unknown advice %d: %w", q.Advice, emm.InvalidArgument)
	}
	return m.vm.Advise(q.Offset, q.Size, vm.Advice(q.Advice))
}

func (s *session) wire(ctx context.Context, q ipc.Wire) error {
	m, err := s.within("wire", q.Mapping, q.Offset, q.Size)
	if err != nil {
		return err
	}
	return m.vm.Wire(ctx, q.Offset, q.Size)
}

func (s *session) unwire(q ipc.Unwire) error {
	m, err := s.within("unwire", q.Mapping, q.Offset, q.Size)
	if err != nil {
		return err
	}
	return m.vm.Unwire(q.Offset, q.Size)
}

func (s *session) discard(ctx context.Context, q ipc.Discard) error {
	m, err := s.within("discard", q.Mapping, q.Offset, q.Size)
	if err != nil {
		return err
	}
	if m.vm.ReadOnly() {
		return fmt.Errorf("discard: the mapping is read-only: %w", emm.ProtectionFailure)
	}
	return m.object.vm.Discard(ctx, m.vm.Offset()+q.Offset, q.Size)
}

func (s *session) setSize(ctx context.Context, q ipc.ObjectSetSize) error {
	o, err := s.object(q.Handle)
	if err != nil {
		return fmt.Errorf("set size of object: %w", err)
	}
	defer s.d.release(o)
	if err := o.vm.SetSize(ctx, q.Size); err != nil {
		return err
	}
	o.size.Store(q.Size)
	return nil
}

func (s *session) setResident(ctx context.Context, q ipc.SetResident) error {
	if err := s.operator(); err != nil {
		return fmt.Errorf("set the budget: %w", err)
	}
	if err := s.d.most.check(q.Bytes); err != nil {
		return fmt.Errorf("set the budget: %w", err)
	}
	return s.d.vm.SetBudget(ctx, q.Bytes)
}

// operator refuses who may not change how the pager works.
func (s *session) operator() error {
	if uid := s.peer.Uid; uid != 0 && int(uid) != os.Geteuid() {
		return fmt.Errorf("user %d may not, only root and user %d: %w", uid, os.Geteuid(), unix.EPERM)
	}
	return nil
}
