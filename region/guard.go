//go:build linux

package region

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"machpager/pager/emm"
)

// Guard calls fn and returns its error; a fault that fn meets in region memory comes back as a *FaultError: a page that cannot be had, a pager that is
// gone, a write to a read-only region, a Region that was closed meanwhile. fn was then left in the middle, like after a panic: its deferred
// functions have run. Without Guard such a fault ends the program. The page is armed again: the next touch asks the pager anew, unless it is gone.
//
// What Guard cannot do:
//
//   - It covers the calling goroutine only, not those that fn starts.
//   - A fault inside the runtime while it holds a lock is fatal all the same: a channel send or receive of a large element straight from or to region
//     memory, a map key or value there; so is one in cgo.
//   - It ends no wait: a page that the pager is still asking for is waited for. (Use Populate, which has a context, first.)
//   - A fault in memory that belongs to no open Region, and every panic that is not a fault, pass through as they came.
//   - fn must not call debug.SetPanicOnFault.
func Guard(fn func() error) (err error) {
	me := inside.begin()
	defer inside.end(me) // when the address of a fault has been looked at
	old := debug.SetPanicOnFault(true)
	defer func() {
		v := recover() // nil too if fn returned, or left by runtime.Goexit
		debug.SetPanicOnFault(old)
		if v == nil {
			return
		}
		addr, ok := faultAddress(v)
		if !ok {
			panic(v)
		}
		r, off := mapped.find(addr)
		if r == nil {
			panic(v)
		}
		err = r.caught(off)
	}()
	return fn()
}

// faultAddress is where the runtime says a fault happened.
func faultAddress(v any) (uintptr, bool) {
	e, ok := v.(interface {
		runtime.Error
		Addr() uintptr
	})
	if !ok {
		return 0, false
	}
	return e.Addr(), true
}

// caught makes the error of a fault at off that ended a touch.
func (r *Region) caught(off int64) *FaultError {
	if err := r.enter(); err != nil {
		return &FaultError{Region: r, Offset: off, Err: err}
	}
	defer r.leave()
	fe := r.fault(off)
	if fe.Err == errNoFault && r.readOnly {
		fe.Err = fmt.Errorf("write to a region that is mapped read-only: %w", emm.ProtectionFailure)
	}
	return fe
}
