package pager

import (
	"fmt"
	"sync/atomic"

	"machpager/pager/emm"
	"machpager/pager/store"
)

// Account bounds the paging space that the objects of one owner take together. A return that would need more is refused as a whole, with ResourceShortage: the pages stay where they are, dirty. What
// is stored in place of older contents, and zeros, need none. Returns that are under way at the same time may together go beyond, by what the vm lends. A page that several
// snapshots share counts for each, and a snapshot for which there is no room is refused: so what is stored in place of it later has its room already.
type Account struct {
	owner string // immutable; for the log
	max   int64  // immutable; slots
	used  atomic.Int64
	full  atomic.Bool // a return was refused, and logged
}

// errQuota is why a return is refused.
var errQuota = fmt.Errorf("the owner's quota of paging space is used up: %w", emm.ResourceShortage)

// NewAccount makes an account of so many bytes, rounded down to whole slots, for the objects of an owner, who is named in the log.
func NewAccount(owner string, bytes int64) *Account {
	return &Account{owner: owner, max: bytes / store.SlotSize}
}

// Stored is how many bytes of paging space the objects of the account take.
func (a *Account) Stored() int64 { return a.used.Load() * store.SlotSize }

// room reports whether n more slots may be taken. nil: any number.
func (a *Account) room(p *Pager, n int64) bool {
	if a == nil || n == 0 || a.used.Load()+n <= a.max {
		return true
	}
	if !a.full.Swap(true) {
		p.log.Warn("an owner's quota of paging space is used up: what he writes stays in memory (raise the quota, or have him discard or end objects)", "owner", a.owner, "quota", a.max*store.SlotSize)
	}
	return false
}

// add counts slots that were taken, or freed.
func (a *Account) add(p *Pager, n int64) {
	if a == nil {
		return
	}
	if used := a.used.Add(n); n < 0 && used < a.max-a.max/16 && a.full.Swap(false) {
		p.log.Info("an owner's quota of paging space has room again", "owner", a.owner)
	}
}

// account is what an object that is still to come is to count for; nil: nothing.
func (p *Pager) account(port emm.Port) *Account {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.charges[port]
}

// Charge has the object of this port count for an account, from now on and for ever; of one that the pager does not have yet (it is taken over at its first page-out) from then on. nil
// forgets one that never came.
func (p *Pager) Charge(port emm.Port, a *Account) {
	p.mu.Lock()
	o := p.objects[port]
	switch {
	case a == nil:
		delete(p.charges, port)
	case o == nil:
		if p.charges == nil {
			p.charges = map[emm.Port]*Account{}
		}
		p.charges[port] = a
	}
	p.mu.Unlock()
	if o == nil || a == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.gone && o.account.CompareAndSwap(nil, a) {
		a.add(p, o.stored*int64(o.unit))
	}
}
