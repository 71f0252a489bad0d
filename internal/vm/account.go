package vm

import (
	"fmt"
	"sync/atomic"
	"time"

	"machpager/pager/emm"
)

// Account bounds what the objects of one owner, a user, may have resident together. At its maximum they make room among their own pages, as one object does under a maximum of its own (see
// residency): by the clocks of the objects, the largest first. What they need then they wait for, and nobody else does.
//
// An object counts for its account from the frames' reservation to their release, so the sum never exceeds the maximum. All fields but the maximum are atomic.
type Account struct {
	max     int64        // immutable; frames
	used    atomic.Int64 // frames
	wired   atomic.Int64 // frames
	lack    atomic.Int64 // frames refused to who waits, since the daemon looked
	full    atomic.Bool  // the daemon found nothing to let go of, and nothing is on its way in or out
	crowded atomic.Bool  // near the maximum: the daemon is to look
}

// NewAccount makes an account of so many bytes, rounded down to whole frames.
func NewAccount(bytes int64) (*Account, error) {
	if bytes < minResidentMax*frameSize {
		return nil, fmt.Errorf("new account: %d bytes may be resident: want at least %d pages of %d bytes: %w", bytes, minResidentMax, frameSize, emm.InvalidArgument)
	}
	return &Account{max: bytes / frameSize}, nil
}

// Resident is how many bytes its objects have resident, or reserved.
func (a *Account) Resident() int64 { return a.used.Load() * frameSize }

// admit takes room for up to n units of f frames, and returns for how many. nil: there is no limit.
func (a *Account) admit(v *VM, n, f int64) int64 {
	if a == nil {
		return n
	}
	for {
		used := a.used.Load()
		got := min(n, (a.max-used)/f)
		if got <= 0 {
			if n == 1 {
				a.lack.Add(f)
				a.crowd(v) // who waits for it kicks
			}
			return 0
		}
		if a.used.CompareAndSwap(used, used+got*f) {
			if low, _ := waterUnder(a.max, f); a.max-used-got*f < low {
				a.crowd(v)
				v.kickNow()
			}
			return got
		}
	}
}

func (a *Account) crowd(v *VM) {
	a.crowded.Store(true)
	v.crowded.Store(true)
}

// add counts frames that came without being asked for (adoption), or go.
func (a *Account) add(f int64) {
	if a != nil {
		a.used.Add(f)
	}
}

// isFull reports whether nothing can be had under the maximum, and nothing is on its way.
func (a *Account) isFull() bool { return a != nil && a.full.Load() }

// mayWire reports whether what is wired of the account, a page of f frames that was counted last included, leaves enough for one instruction, and as much again.
func (a *Account) mayWire(f int64) bool {
	return a == nil || a.wired.Load() <= a.max-minResidentMax/2*f
}

func (a *Account) addWired(f int64) {
	if a != nil {
		a.wired.Add(f)
	}
}

// makeRoom lets the account's objects among these let go of pages, those that have most first.
func (a *Account) makeRoom(objects []*Object) {
	var leaving, unit int64
	var own []*Object
	for _, o := range objects {
		if o.account == a {
			own = append(own, o)
			leaving += o.room.leaving.Load()
			unit = max(unit, int64(o.framesOf(1)))
		}
	}
	low, high := waterUnder(a.max, unit)
	lack := min(a.lack.Swap(0), a.max/2)
	free := a.max - a.used.Load() + leaving
	if free >= max(low, lack) {
		a.full.Store(false)
		return
	}
	want, begun, coming := max(high, lack)-free, int64(0), 0
	now := time.Now()
	for begun < want && len(own) > 0 {
		most := 0
		for i, o := range own {
			if o.resident.Load() > own[most].resident.Load() {
				most = i
			}
		}
		o := own[most]
		own[most] = own[len(own)-1]
		own = own[:len(own)-1]
		if !o.gate.enter() {
			continue
		}
		begun += o.sweep(want-begun, o.resting(now))
		o.reqMu.Lock()
		coming += len(o.requests)
		o.reqMu.Unlock()
		o.gate.leave()
	}
	a.full.Store(begun == 0 && coming == 0 && leaving == 0)
}
