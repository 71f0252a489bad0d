package daemon

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"slices"
	"sync/atomic"

	"machpager/internal/failpoint"
	"machpager/internal/ipc"
	"machpager/pager/emm"
)

// Rights. The port that an object is made with gives full access. Who has that can make further ports that give less, to hand to others, and take each of them back. A port is
// found by its digest, so that the time which a look-up takes says nothing of any port, and compared in constant time.

// maxRights is how many lesser ports an object can have: its record must hold them.
const maxRights = 32

// right is a lesser right to an object. nil is the full right.
type right struct {
	port    emm.Port    // immutable
	flags   uint32      // immutable; ipc.RightReadOnly, ipc.RightNoResize
	revoked atomic.Bool // it is taken back: nothing can be done with it any more
}

// rightRecord is a right in its object's record.
type rightRecord struct {
	Port    string
	Flags   uint32
	Session uint64 // which made it, by the request
	Seq     uint32
}

// digest is what a port is found by.
type digest [sha256.Size]byte

func digestOf(p emm.Port) digest { return sha256.Sum256(p[:]) }

// named is an object under one of its ports.
type named struct {
	port   emm.Port
	object *object
	right  *right // nil: full
}

// name makes a port one that can be opened. Called with mu.
func (t *objects) name(p emm.Port, o *object, r *right) {
	t.byPort[digestOf(p)] = named{p, o, r}
	if r != nil {
		o.lesser = append(o.lesser, r)
	}
}

// find is called with mu.
func (t *objects) find(p emm.Port) (named, bool) {
	n, ok := t.byPort[digestOf(p)]
	return n, ok && subtle.ConstantTimeCompare(n.port[:], p[:]) == 1
}

// forget makes ports of an object none. Called with mu.
func (t *objects) forget(o *object) {
	delete(t.byPort, digestOf(o.port))
	for _, r := range o.lesser {
		delete(t.byPort, digestOf(r.port))
	}
}

// allows is an error if a right forbids something: one of the flags, or anything once it is taken back. nil allows all.
func (r *right) allows(forbidden uint32) error {
	switch {
	case r == nil:
		return nil
	case r.revoked.Load():
		return fmt.Errorf("the right by which this object was opened has been taken back: %w", emm.NoAccess)
	case r.flags&forbidden&ipc.RightReadOnly != 0:
		return fmt.Errorf("the port gives a right to read alone: map it read-only (MapOptions.ReadOnly): %w", emm.ProtectionFailure)
	case r.flags&forbidden != 0:
		return fmt.Errorf("the port gives no right to change the size: %w", emm.ProtectionFailure)
	}
	return nil
}

// by is the right that a handle was made by.
func (s *session) by(handle uint64) *right {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rights[handle]
}

// makeRight makes a port that gives less than the handle does.
func (s *session) makeRight(m *ipc.Message) (ipc.Reply, error) {
	q, _, err := ipc.Decode[ipc.ObjectRight](m.Body)
	if err != nil {
		return ipc.Reply{}, err
	}
	o, err := s.object(q.Handle)
	if err != nil {
		return ipc.Reply{}, fmt.Errorf("make right: %w", err)
	}
	defer s.d.release(o)
	flags := q.Flags
	if r := s.by(q.Handle); r != nil {
		flags |= r.flags
	}
	switch {
	case flags == 0 || q.Flags&^(ipc.RightReadOnly|ipc.RightNoResize) != 0:
		return ipc.Reply{}, fmt.Errorf("make right: flags %#x: want what it is not to give: %w", q.Flags, emm.InvalidArgument)
	case o.port.IsNull():
		return ipc.Reply{}, fmt.Errorf("make right: the object is private, and has no ports: %w", emm.InvalidArgument)
	}
	if flags&ipc.RightReadOnly != 0 {
		flags |= ipc.RightNoResize
	}
	o.sizeMu.Lock() // one change at a time
	defer o.sizeMu.Unlock()
	for _, r := range o.record.Rights {
		if m.Resent() && r.Session == s.id && r.Seq == m.Seq {
			p, err := emm.ParsePort(r.Port)
			return ipc.Reply{Body: ipc.ObjectRightReply{Port: p}}, err
		}
	}
	if err := room("lesser rights to this object", len(o.record.Rights), maxRights); err != nil {
		return ipc.Reply{}, fmt.Errorf("make right: %w (take some back: Object.Revoke)", err)
	}
	r := &right{port: emm.NewPort(), flags: flags}
	old := o.record.Rights
	o.setRights(append(slices.Clip(old), rightRecord{r.port.String(), flags, s.id, m.Seq}))
	if err := s.d.holdRecord(o); err != nil {
		o.setRights(old)
		return ipc.Reply{}, fmt.Errorf("make right: %w", err)
	}
	failpoint.Here("daemon.right.held")
	s.d.objects.mu.Lock()
	s.d.objects.name(r.port, o, r)
	s.d.objects.mu.Unlock()
	return ipc.Reply{Body: ipc.ObjectRightReply{Port: r.port}}, nil
}

// revoke takes a lesser right back: the port opens nothing any more, the handles that were made by it do nothing, and its mappings are served no more. All pages of the object go out of memory, so
// that those mappings have none left; the others fault theirs in again. The next pager does what is left of it: the record is first.
func (s *session) revoke(ctx context.Context, m *ipc.Message) error {
	q, _, err := ipc.Decode[ipc.ObjectRevoke](m.Body)
	if err != nil {
		return err
	}
	o, err := s.object(q.Handle)
	if err != nil {
		return fmt.Errorf("revoke right: %w", err)
	}
	defer s.d.release(o)
	if s.by(q.Handle) != nil {
		return fmt.Errorf("revoke right: only who has the full right can take others back: %w", emm.NoAccess)
	}
	o.sizeMu.Lock()
	defer o.sizeMu.Unlock()
	s.d.objects.mu.Lock()
	n, ok := s.d.objects.find(q.Port)
	s.d.objects.mu.Unlock()
	if !ok || n.object != o || n.right == nil {
		if m.Resent() {
			return nil
		}
		return fmt.Errorf("revoke right: it is no lesser right to this object: %w", emm.InvalidArgument)
	}
	old := o.record.Rights
	o.setRights(slices.DeleteFunc(slices.Clone(old), func(r rightRecord) bool { return r.Port == n.port.String() }))
	if err := s.d.holdRecord(o); err != nil {
		o.setRights(old)
		return fmt.Errorf("revoke right: %w", err)
	}
	failpoint.Here("daemon.revoke.held")
	n.right.revoked.Store(true)
	s.d.objects.mu.Lock()
	delete(s.d.objects.byPort, digestOf(n.port))
	o.lesser = slices.DeleteFunc(o.lesser, func(r *right) bool { return r == n.right })
	s.d.objects.mu.Unlock()
	served := false
	s.d.mappings.Range(func(_, x any) bool {
		if x := x.(*mapping); x.right == n.right {
			x.vm.Close()
			served = true
		}
		return true
	})
	if !served {
		return nil
	}
	if err := o.vm.PageOut(ctx, 0, o.vm.Size()); err != nil {
		return fmt.Errorf("revoke right: it is taken back, but pages that its mappings have seen stay there: %w", err)
	}
	return nil
}

// setRights changes the record. sizeMu is held by who changes the rights, so he may read them without recordMu.
func (o *object) setRights(list []rightRecord) {
	o.recordMu.Lock()
	defer o.recordMu.Unlock()
	o.record.Rights = list
}

// rightOf is the lesser right that a handle or a mapping was made by under an earlier pager: nil for "". One that was taken back is a right that allows nothing.
func (d *Daemon) rightOf(o *object, port string) *right {
	if port == "" {
		return nil
	}
	d.objects.mu.Lock()
	defer d.objects.mu.Unlock()
	for _, r := range o.lesser {
		if r.port.String() == port {
			return r
		}
	}
	r := &right{flags: ipc.RightReadOnly | ipc.RightNoResize}
	r.revoked.Store(true)
	return r
}
