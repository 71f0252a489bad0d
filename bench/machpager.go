//go:build linux

package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"machpager/region"
)

// pagerLimit bounds each call to the pager: longer is a hang.
const pagerLimit = 30 * time.Second

// pagerSystem is machpager: a new memory object of the default pager for each workload. Each placement has a pager of its own: a pager chooses CPUs for
// its threads, and one that was pinned and let go is not what it was.
type pagerSystem map[Placement]*dialled

type dialled struct {
	pager *region.Pager
	pids  []int // of the processes that answer faults
}

// dialPagers connects to the pagers that the driver started.
func dialPagers(sockets map[Placement]string) (pagerSystem, error) {
	ctx, cancel := context.WithTimeout(context.Background(), pagerLimit)
	defer cancel()
	s := pagerSystem{}
	for placement, socket := range sockets {
		p, err := region.Dial(ctx, socket, nil)
		if err != nil {
			return nil, err
		}
		info, err := p.Info(ctx)
		if err != nil {
			return nil, err
		}
		s[placement] = &dialled{p, []int{info.PagerPID}}
	}
	return s, nil
}

func (s pagerSystem) open(w workload) (_ *target, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), pagerLimit)
	defer cancel()
	d := s[w.Placement]
	object, err := d.pager.ObjectCreate(ctx, int64(w.size()), &region.ObjectOptions{ClusterSize: int64(w.Cluster) * pageSize})
	if err != nil {
		return nil, err
	}
	t := &target{stored: w.Op == StoredRead || w.Op == Minor, handlers: d.pids}
	regions := make([]*region.Region, 0, 2)
	t.close = func() error {
		var errs []error
		for _, r := range regions {
			errs = append(errs, r.Close())
		}
		return errors.Join(append(errs, object.Close())...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("machpager: %w", err), t.close())
		}
	}()
	mapObject := func() (*region.Region, error) {
		r, err := object.Map(ctx, nil)
		if err == nil {
			regions = append(regions, r)
		}
		return r, err
	}
	a, err := mapObject()
	if err != nil {
		return nil, err
	}
	t.mem = a.Bytes()
	if t.stored {
		if err := a.Populate(ctx, 0, a.Size(), true); err != nil {
			return nil, err
		}
		fillAll(t.mem)
		if err := a.PageOut(ctx, 0, a.Size()); err != nil {
			return nil, err
		}
	}
	if w.Op == Minor || w.Op == WriteProtect {
		if err := readAll(t.mem, t.stored); err != nil {
			return nil, err
		}
	}
	if w.Op == Minor {
		b, err := mapObject()
		if err != nil {
			return nil, err
		}
		t.mem = b.Bytes()
	}
	return t, nil
}
