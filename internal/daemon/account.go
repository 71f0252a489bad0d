package daemon

import (
	"fmt"
	"sync"

	"machpager/internal/frames"
	"machpager/internal/vm"
	"machpager/pager"
	"machpager/pager/emm"
)

// accounts are what bounds the memory and the paging space of each user who has made objects. They are kept for the life of the pager, some hundred bytes for a user. After the death of a
// pager the next one counts anew what the objects have, of which the guardian knows who made them.
type accounts struct {
	resident, paging int64 // immutable; bytes; 0: no limit

	mu     sync.Mutex
	byUser map[uint32]*account // guarded by mu
}

// account is one user's. Nil parts bound nothing.
type account struct {
	vm     *vm.Account
	paging *pager.Account
}

// of is the user's account.
func (s *accounts) of(uid uint32) (*account, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.byUser[uid]; a != nil {
		return a, nil
	}
	a := &account{}
	if s.resident > 0 {
		var err error
		if a.vm, err = vm.NewAccount(s.resident); err != nil {
			return nil, fmt.Errorf("quota of resident memory (serve --user-resident): %w", err)
		}
	}
	if s.paging > 0 {
		a.paging = pager.NewAccount(fmt.Sprintf("user %d", uid), s.paging)
	}
	if s.byUser == nil {
		s.byUser = map[uint32]*account{}
	}
	s.byUser[uid] = a
	return a, nil
}

// charge has what the default pager stores of the object of this port count for the user.
func (d *Daemon) charge(a *account, port emm.Port) {
	if a.paging != nil {
		d.pager.Charge(port, a.paging)
	}
}

// discharge forgets a port of which the default pager was never given anything.
func (d *Daemon) discharge(port emm.Port) {
	if d.accounts.paging > 0 {
		d.pager.Charge(port, nil)
	}
}

// checkMemory finds quotas of memory that make no sense.
func (q Quotas) checkMemory() error {
	switch {
	case q.UserResident != 0 && q.UserResident < minPages*frames.PageSize:
		return fmt.Errorf("quota: %d bytes of resident memory of a user: at least %d are needed: %w", q.UserResident, int64(minPages*frames.PageSize), emm.InvalidArgument)
	case q.UserPaging != 0 && q.UserResident == 0:
		return fmt.Errorf("quota: paging space of a user is bounded, but not his resident memory, where everything stays that may not be stored: set both (serve --user-resident): %w", emm.InvalidArgument)
	}
	return nil
}
