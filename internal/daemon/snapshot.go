package daemon

import (
	"context"
	"fmt"

	"machpager/internal/failpoint"
	"machpager/internal/ipc"
	"machpager/internal/vm"
	"machpager/pager/emm"
)

// snapshot makes an object with the contents that another has at this instant, and gives the task a right to it.
func (s *session) snapshot(ctx context.Context, m *ipc.Message) (ipc.Reply, error) {
	q, _, err := ipc.Decode[ipc.ObjectSnapshot](m.Body)
	if err != nil {
		return ipc.Reply{}, err
	}
	if h, o := s.madeHandle(m); o != nil {
		return s.tell(h, o), nil
	}
	if err := s.roomForHandle(); err != nil {
		return ipc.Reply{}, fmt.Errorf("snapshot: %w", err)
	}
	o, err := s.object(q.Handle)
	if err != nil {
		return ipc.Reply{}, fmt.Errorf("snapshot: %w", err)
	}
	defer s.d.release(o)
	c, err := s.d.snapshot(ctx, o, s.peer.Uid)
	if err != nil {
		return ipc.Reply{}, err
	}
	return s.handOut(c, m.Seq)
}

// snapshot makes an object with one right. Only the default pager can share what it has stored.
func (d *Daemon) snapshot(ctx context.Context, o *object, user uint32) (*object, error) {
	size := o.size.Load()
	if err := d.roomFor(user, size); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	account, err := d.accounts.of(user)
	if err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	switch {
	case o.manager != nil:
		return nil, fmt.Errorf("snapshot: an object of the manager %q, want one of the default pager: %w", o.name, emm.InvalidArgument)
	case size == 0:
		return nil, fmt.Errorf("snapshot: the object has no bytes: %w", emm.InvalidArgument)
	}
	c := &object{port: emm.NewPort(), own: true, cluster: o.cluster}
	c.size.Store(size)
	d.charge(account, c.port)
	if err := o.vm.Snapshot(ctx, func(port emm.Port) error { return d.pager.Snapshot(port, c.port) }); err != nil {
		d.discharge(c.port)
		return nil, err
	}
	failpoint.Here("daemon.snapshot.shared")
	if c.vm, err = d.vm.NewObject(vm.ObjectOptions{Size: size, PageSize: o.vm.PageSize(), ClusterSize: c.cluster, Port: c.port, Manager: d.pager, Account: account.vm}); err != nil {
		d.endManager(c, c.port)
		return nil, err
	}
	c.record = objectRecord{Port: c.port.String(), Size: size, PageSize: o.vm.PageSize(), Cluster: c.cluster, User: user, Own: true}
	d.objects.add(c)
	if err := d.holdObject(c, -1); err != nil {
		d.release(c)
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	return c, nil
}
