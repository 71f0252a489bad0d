package daemon

import (
	"context"
	"fmt"
	"sync"
	"time"

	"machpager/internal/vm"
	"machpager/pager/emm"
)

// Quotas are what one user, by all connections together, and one task, by one connection, may have of the pager. 0: the default.
type Quotas struct {
	UserConnections int   // default three quarters of all, which RLIMIT_NOFILE bounds
	UserObjects     int   // that he has made; default three quarters of all, which RLIMIT_NOFILE bounds
	UserSpace       int64 // bytes of the objects he has made: more they cannot take, of frames and paging space together; default no limit
	UserResident    int64 // bytes that the objects he has made have resident together, at least 8 pages; beyond, they make room among their own; default no limit
	UserPaging      int64 // bytes of paging space that they take together; what is beyond stays resident, so it needs UserResident; default no limit
	TaskMapped      int64 // bytes of all mappings; default no limit
	TaskFaults      int   // data requests that are out at once for its faults; further faults wait; default 256
	TaskRequests    int   // a second; what comes faster waits; default 20000
}

const (
	defaultTaskRequests = 20000
	// requestBurst is how long a task may have been silent for its requests to come at once: as many as in that time.
	requestBurst = 100 * time.Millisecond
)

// check finds what makes no sense.
func (q Quotas) check() error {
	for _, x := range []struct {
		what string
		n    int64
	}{{"connections of a user", int64(q.UserConnections)}, {"objects of a user", int64(q.UserObjects)}, {"bytes of the objects of a user", q.UserSpace},
		{"bytes of resident memory of a user", q.UserResident}, {"bytes of paging space of a user", q.UserPaging}, {"data requests of a task at once", int64(q.TaskFaults)},
		{"bytes mapped by a task", q.TaskMapped}, {"requests of a task in a second", int64(q.TaskRequests)}} {
		if x.n < 0 {
			return fmt.Errorf("quota: %d %s: %w", x.n, x.what, emm.InvalidArgument)
		}
	}
	return q.checkMemory()
}

// quotas are set by the configuration, within what there is.
func (l *limits) quotas(q Quotas) {
	if q.UserConnections > 0 {
		l.userSessions = min(l.sessions, q.UserConnections)
	}
	l.userObjects = l.objects - l.objects/4
	if q.UserObjects > 0 {
		l.userObjects = min(l.objects, q.UserObjects)
	}
	l.userSpace, l.taskMapped, l.taskRequests = q.UserSpace, q.TaskMapped, q.TaskRequests
	if l.taskRequests == 0 {
		l.taskRequests = defaultTaskRequests
	}
	l.userResident, l.userPaging, l.taskFaults = q.UserResident, q.UserPaging, q.TaskFaults
	if l.taskFaults == 0 {
		l.taskFaults = vm.DefaultTaskFaults
	}
}

// text is for people, in info.
func (l *limits) text() string {
	bytes := func(n int64) string {
		if n == 0 {
			return "any number of"
		}
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("user: %d connections, %d objects of %s bytes together, %s bytes resident, %s bytes in paging space; "+
		"task: %d handles, %d mappings of %s bytes together, %d requests a second, %d data requests at once; all: %d connections, %d objects",
		l.userSessions, l.userObjects, bytes(l.userSpace), bytes(l.userResident), bytes(l.userPaging), l.handles, l.mappings, bytes(l.taskMapped), l.taskRequests, l.taskFaults, l.sessions, l.objects)
}

// made is what a user has made.
type made struct {
	objects int
	space   int64 // bytes
}

// charge counts an object for who made it, and takes it off. Called with mu.
func (t *objects) charge(o *object, n int) {
	m := t.made[o.record.User]
	m.objects += n
	m.space += int64(n) * o.record.Size
	if m.objects == 0 {
		delete(t.made, o.record.User)
		return
	}
	t.made[o.record.User] = m
}

// roomFor is an error if a user may not make one more object of so many bytes. Requests that are served at the same time may go a little beyond.
func (d *Daemon) roomFor(uid uint32, size int64) error {
	if err := room("objects", d.objects.len(), d.limits.objects); err != nil {
		return fmt.Errorf("%w (raise the pager's RLIMIT_NOFILE, or end some)", err)
	}
	d.objects.mu.Lock()
	m := d.objects.made[uid]
	d.objects.mu.Unlock()
	switch l := &d.limits; {
	case m.objects >= l.userObjects:
		return fmt.Errorf("user %d has made %d objects, which is the quota (serve --user-objects): %w", uid, m.objects, emm.ResourceShortage)
	case l.userSpace > 0 && size > l.userSpace-m.space:
		return fmt.Errorf("user %d has made objects of %d bytes, and %d more are beyond the quota of %d (serve --user-space): %w", uid, m.space, size, l.userSpace,
			emm.ResourceShortage)
	}
	return nil
}

// roomToMap is an error if the task may not map so many bytes more.
func (s *session) roomToMap(size int64) error {
	most := s.d.limits.taskMapped
	if most == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var have int64
	for _, m := range s.mappings {
		have += m.record.Size
	}
	if size > most-have {
		return fmt.Errorf("this connection has %d bytes mapped, and %d more are beyond the quota of %d (serve --task-mapped): %w", have, size, most, emm.ResourceShortage)
	}
	return nil
}

// pace holds back who asks too much: each request takes its time of a second, and what comes before its time waits.
type pace struct {
	mu   sync.Mutex
	next time.Time // guarded by mu; when the next request may be served
}

// wait waits until it is a request's turn, or ctx ends.
func (p *pace) wait(ctx context.Context, perSecond int) error {
	now := time.Now()
	p.mu.Lock()
	if earliest := now.Add(-requestBurst); p.next.Before(earliest) {
		p.next = earliest
	}
	at := p.next
	p.next = p.next.Add(time.Second / time.Duration(perSecond))
	p.mu.Unlock()
	if !at.After(now) {
		return nil
	}
	select {
	case <-time.After(at.Sub(now)):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
