package vm

import (
	"math"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"machpager/pager/emm"
)

// storeFailing makes the page-out daemon try less and less often, and with fewer pages at once, while a manager stores nothing, until a page is stored again: paging space
// may have room for some pages yet. In between only pages go that are stored already. There is one for each manager, so that those of others go as before.
type storeFailing struct {
	key   failingKey // immutable; zero: of one object alone
	users int        // guarded by failings.mu; objects
	mu    sync.Mutex
	wait  time.Duration // guarded by mu; 0: all is well
	until time.Time     // guarded by mu
	told  time.Time     // guarded by mu; when it was logged
	well  bool          // guarded by mu; nothing failed since told
	run   atomic.Int64  // pages returned at once; 0: no limit
	late  atomic.Int64  // returns that may yet complete in the call until the manager counts as one that stores at once
}

const (
	failingFirst = 5 * time.Millisecond
	failingLast  = time.Second
	failingTell  = time.Minute // no more often than that

	// failingRun is how many pages are returned at once after the first failure, and an eighth of that after the next.
	failingRun = 64
)

// failed notes that the manager could not store pages of o, and says so once.
func (f *storeFailing) failed(o *Object, reason error) {
	v := o.vm
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if f.wait == 0 && now.Sub(f.told) > failingTell {
		v.log.Warn("page-out: pages cannot be stored; they stay resident, and when no frame is left, faults fail", "object", o.id, "reason", reason)
		f.told, f.well = now, false
	}
	if now.After(f.until) {
		f.wait = min(max(2*f.wait, failingFirst), failingLast)
		f.until = now.Add(f.wait)
		if n := f.run.Load(); n == 0 {
			f.run.Store(failingRun)
		} else {
			f.run.Store(max(1, n/8))
		}
	}
}

// works notes that pages of o were stored. All is well when that goes on.
func (f *storeFailing) works(o *Object) {
	v := o.vm
	run := f.run.Load()
	if run == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wait, f.until = 0, time.Time{}
	if run *= 2; run <= 2*failingRun {
		f.run.Store(run)
		return
	}
	f.run.Store(0)
	if !f.well {
		v.log.Info("page-out: pages can be stored again")
		f.well = true
	}
}

func (f *storeFailing) pause(now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return now.Before(f.until)
}

// most is how many pages may be returned at once.
func (f *storeFailing) most() int64 {
	if n := f.run.Load(); n > 0 {
		return n
	}
	return math.MaxInt64
}

// lateFor is how many returns in a row must complete in the call itself before nothing is cleaned ahead any more.
const lateFor = 64

// answers notes whether the manager has completed a return before the call that made it came back.
func (f *storeFailing) answers(late bool) {
	if late {
		f.late.Store(lateFor)
	} else if f.late.Load() > 0 {
		f.late.Add(-1)
	}
}

// takesTime reports whether the manager takes longer to store a page than the page-out daemon is in the call.
func (f *storeFailing) takesTime() bool { return f.late.Load() > 0 }

// failings are what is known of each manager's store.
type failings struct {
	mu  sync.Mutex                   // a leaf
	all map[failingKey]*storeFailing // guarded by mu
	own storeFailing                 // of objects that have no manager yet
}

// failingKey is whose store it is, and for whom: a manager may refuse what one owner's objects return, and take what others' do.
type failingKey struct {
	manager any
	account *Account
}

// enter finds what is known of m's store, for one object more of an account.
func (s *failings) enter(m emm.Manager, a *Account) *storeFailing {
	if !reflect.TypeOf(m).Comparable() {
		return &storeFailing{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := failingKey{m, a}
	f := s.all[key]
	if f == nil {
		if s.all == nil {
			s.all = map[failingKey]*storeFailing{}
		}
		f = &storeFailing{key: key}
		s.all[key] = f
	}
	f.users++
	return f
}

// leave forgets it with the last object.
func (s *failings) leave(f *storeFailing) {
	if f.key == (failingKey{}) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.users--; f.users == 0 {
		delete(s.all, f.key)
	}
}

// failing is what is known of the store of o's manager.
func (o *Object) failing() *storeFailing {
	if b := o.binding.Load(); b != nil {
		return b.failing
	}
	return &o.vm.failings.own
}

// resting reports whether the page-out daemon returns nothing of o at present: its manager stores nothing, or leaves a return unanswered for long.
func (o *Object) resting(now time.Time) bool { return o.stalled.Load() || o.failing().pause(now) }
