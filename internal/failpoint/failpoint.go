// Package failpoint lets a test end, stop or delay this process at a named instant: between any two steps after which a crash must lose nothing. And it lets what can fail fail.
// Outside tests nothing is armed, and a failpoint costs one load.
//
// Names are "room.step", in lower case: "install.copied" is the instant after the copy of install. Every name is a constant where it is passed, so
// that grep finds both ends.
package failpoint

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// armed is all that is armed; nil: nothing, in every process but a test's.
var armed atomic.Pointer[points]

type points struct {
	all map[string]*point // immutable

	mu   sync.Mutex
	hits map[string]int64 // guarded by mu; of every name that was met, armed or not
}

type point struct {
	after  atomic.Int64 // hits left until it fires
	every  int64        // immutable; of fail: it fires at each hit whose number this divides
	action action       // immutable
	delay  time.Duration
	err    error // immutable; of fail
}

type action int

const (
	kill action = iota
	stop
	sleep
	count
	fail
)

// Here is where the failpoint of this name is.
func Here(name string) {
	if p := armed.Load(); p != nil {
		p.hit(name)
	}
}

// Fail is where the failpoint of this name is in the place of something that can fail, a system call: not nil is what it is to fail with.
func Fail(name string) error {
	p := armed.Load()
	if p == nil {
		return nil
	}
	if pt, left := p.hit(name); pt != nil && pt.action == fail && left%pt.every == 0 {
		return pt.err
	}
	return nil
}

// Arm arms failpoints: "name=n:action,…", where the n-th meeting counts (1: the first; 0 is 1) and action is kill (SIGKILL, the default), stop
// (SIGSTOP), eio or enospc (at every n-th meeting, where [Fail] asks), sleep and a duration ("sleep20ms", at each meeting from the n-th on), or count, which does nothing but have [Hits] count. What was armed before
// is armed no more. "" disarms all.
func Arm(spec string) error {
	if spec == "" {
		armed.Store(nil)
		return nil
	}
	p := &points{all: map[string]*point{}, hits: map[string]int64{}}
	for part := range strings.SplitSeq(spec, ",") {
		name, rest, _ := strings.Cut(part, "=")
		number, what, _ := strings.Cut(rest, ":")
		n, err := int64(1), error(nil)
		if number != "" {
			n, err = strconv.ParseInt(number, 10, 64)
		}
		pt := &point{}
		switch {
		case what == "" || what == "kill":
		case what == "stop":
			pt.action = stop
		case what == "count":
			pt.action = count
		case what == "eio":
			pt.action, pt.err = fail, unix.EIO
		case what == "enospc":
			pt.action, pt.err = fail, unix.ENOSPC
		case strings.HasPrefix(what, "sleep"):
			pt.action = sleep
			var e error
			pt.delay, e = time.ParseDuration(what[len("sleep"):])
			err = errors.Join(err, e)
		default:
			err = errors.Join(err, fmt.Errorf("unknown action %q", what))
		}
		if name == "" || n < 0 || err != nil {
			return fmt.Errorf("arm failpoint %q: want name=number:action: %w", part, errors.Join(err, unix.EINVAL))
		}
		pt.every = max(n, 1)
		pt.after.Store(pt.every)
		p.all[name] = pt
	}
	armed.Store(p)
	return nil
}

// Hits is how often each failpoint was met since something was armed.
func Hits() map[string]int64 {
	p := armed.Load()
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	m := make(map[string]int64, len(p.hits))
	for k, v := range p.hits {
		m[k] = v
	}
	return m
}

// hit does what the point does that is armed under the name, if one is, and returns it and how many hits were left then.
func (p *points) hit(name string) (*point, int64) {
	p.mu.Lock()
	p.hits[name]++
	p.mu.Unlock()
	pt := p.all[name]
	if pt == nil {
		return nil, 0
	}
	left := pt.after.Add(-1)
	switch {
	case pt.action == sleep && left <= 0:
		time.Sleep(pt.delay)
	case left != 0 || pt.action == count || pt.action == fail:
	case pt.action == stop:
		unix.Kill(unix.Getpid(), unix.SIGSTOP)
	default:
		unix.Kill(unix.Getpid(), unix.SIGKILL)
		select {} // not one instruction more
	}
	return pt, left
}
