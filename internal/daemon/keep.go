package daemon

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
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

func (s *session) wire(ctx context.Context, q ipc.Wire, h ipc.Header) (ipc.Reply, error) {
	m, err := s.within("wire", q.Mapping, q.Offset, q.Size)
	if err != nil || q.Size == 0 || h.Resent() && m.counted(h.Seq) {
		return ipc.Reply{}, err
	}
	if err := m.vm.Wire(ctx, q.Offset, q.Size); err != nil {
		return ipc.Reply{}, err
	}
	failpoint.Here("daemon.wire.made")
	answered, err := m.count(s.d, q.Offset, q.Size, 1, h.Seq)
	if err != nil {
		m.vm.Unwire(q.Offset, q.Size)
		return ipc.Reply{}, fmt.Errorf("wire: %w", err)
	}
	failpoint.Here("daemon.wire.held")
	return ipc.Reply{Done: answered}, nil
}

func (s *session) unwire(q ipc.Unwire, h ipc.Header) (ipc.Reply, error) {
	m, err := s.within("unwire", q.Mapping, q.Offset, q.Size)
	if err != nil || q.Size == 0 || h.Resent() && m.counted(h.Seq) {
		return ipc.Reply{}, err
	}
	if err := m.vm.Unwire(q.Offset, q.Size); err != nil {
		return ipc.Reply{}, err
	}
	failpoint.Here("daemon.unwire.made")
	answered, err := m.count(s.d, q.Offset, q.Size, -1, h.Seq)
	if err != nil {
		s.log.Warn("unwire", "err", err) // the next pager has too much wired
	}
	return ipc.Reply{Done: answered}, nil
}

func (s *session) discard(ctx context.Context, q ipc.Discard) error {
	m, err := s.within("discard", q.Mapping, q.Offset, q.Size)
	if err != nil {
		return err
	}
	if m.vm.ReadOnly() {
		return fmt.Errorf("discard: the mapping is read-only: %w", emm.ProtectionFailure)
	}
	err = m.object.vm.Discard(ctx, m.vm.Offset()+q.Offset, q.Size)
	failpoint.Here("daemon.discard.done")
	return err
}

func (s *session) setSize(ctx context.Context, q ipc.ObjectSetSize) error {
	o, err := s.object(q.Handle)
	if err != nil {
		return fmt.Errorf("set size of object: %w", err)
	}
	defer s.d.release(o)
	if err := s.by(q.Handle).allows(ipc.RightNoResize); err != nil {
		return fmt.Errorf("set size of object: %w", err)
	}
	if q.Size < 0 || q.Size > o.record.Size {
		return fmt.Errorf("set size of object: %d bytes: want 0 to %d, which it was made with: %w", q.Size, o.record.Size, emm.InvalidArgument)
	}
	o.sizeMu.Lock()
	defer o.sizeMu.Unlock()
	// First the record, also of a larger size: what is written there at once must not be taken for left over by a smaller one. See finishShrink.
	old := o.size.Swap(q.Size)
	err = s.d.holdRecord(o)
	failpoint.Here("daemon.size.held")
	if err == nil {
		err = o.vm.SetSize(ctx, q.Size)
		failpoint.Here("daemon.size.done")
	}
	if err != nil {
		o.size.Store(old)
		if herr := s.d.holdRecord(o); herr != nil {
			s.log.Warn("set size of object", "err", herr)
		}
	}
	return err
}

func (s *session) setResident(ctx context.Context, q ipc.SetResident) error {
	if err := s.operator(); err != nil {
		return fmt.Errorf("set the budget: %w", err)
	}
	if err := s.d.most.check(q.Bytes); err != nil {
		return fmt.Errorf("set the budget: %w", err)
	}
	if err := s.d.vm.SetBudget(ctx, q.Bytes); err != nil {
		return err
	}
	s.d.recordMu.Lock()
	s.d.record.Budget = s.d.frames.Budget()
	s.d.recordMu.Unlock()
	failpoint.Here("daemon.budget.done")
	return s.d.holdPager()
}

// operator refuses who may not change how the pager works.
func (s *session) operator() error {
	if uid := s.peer.Uid; uid != 0 && int(uid) != os.Geteuid() {
		return fmt.Errorf("user %d may not, only root and user %d: %w", uid, os.Geteuid(), unix.EPERM)
	}
	return nil
}
