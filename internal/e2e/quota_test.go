package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

func init() { tasks["quotas"] = quotasTask }

// quotasTask meets each quota, reads what the refusal says, and goes on when it has given something back.
func quotasTask(*conn) error {
	ctx := context.Background()
	p, err := startPager(ctx, spawn.Options{Resident: 16 << 20, Quotas: spawn.Quotas{UserObjects: 3, UserSpace: 1 << 20, TaskMapped: 512 << 10}})
	if err != nil {
		return err
	}
	defer p.Close()
	beyond := func(err error, says string) error {
		if !errors.Is(err, emm.ResourceShortage) || !strings.Contains(err.Error(), says) {
			return fmt.Errorf("want a refusal that says %q, got: %w", says, err)
		}
		return nil
	}
	_, err = p.ObjectCreate(ctx, 2<<20, nil)
	if err := beyond(err, "--user-space"); err != nil {
		return err
	}
	var list []*region.Object
	for range 3 {
		o, err := p.ObjectCreate(ctx, 256<<10, nil)
		if err != nil {
			return err
		}
		list = append(list, o)
	}
	_, err = p.ObjectCreate(ctx, 4096, nil)
	if err := beyond(err, "--user-objects"); err != nil {
		return err
	}
	_, err = list[0].Snapshot(ctx)
	if err := beyond(err, "--user-objects"); err != nil {
		return err
	}
	for _, o := range list[:2] {
		if _, err := o.Map(ctx, nil); err != nil {
			return err
		}
	}
	_, err = list[2].Map(ctx, nil)
	if err := beyond(err, "--task-mapped"); err != nil {
		return err
	}
	if err := list[2].Close(); err != nil {
		return err
	}
	if _, err := p.ObjectCreate(ctx, 256<<10, nil); err != nil {
		return fmt.Errorf("after one has been given back: %w", err)
	}
	info, err := p.Info(ctx)
	if err != nil || !strings.Contains(info.Quotas, "3 objects of 1048576 bytes") {
		return fmt.Errorf("info says %q, %w", info.Quotas, err)
	}
	return nil
}

// TestQuotas: what is beyond a quota is refused, with the name of the quota, and nothing else is.
func TestQuotas(t *testing.T) { run(t, "quotas", nil, nil, nil) }
