package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

func init() { tasks["resident"] = func(*conn) error { return resident(context.Background()) } }

// An object's own limits reach the pager, and hold by the kernel's count.
func TestResident(t *testing.T) { run(t, "resident", nil, nil, nil) }

func resident(ctx context.Context) error {
	const budget, most, least = 16 << 20, 1 << 20, 4 << 20
	p, err := spawn.Start(ctx, &spawn.Options{Resident: budget, Store: "memory"})
	if err != nil {
		return err
	}
	defer p.Close()
	for _, c := range []struct {
		o    region.ObjectOptions
		want error
	}{
		{region.ObjectOptions{ResidentMin: budget}, emm.ResourceShortage},
		{region.ObjectOptions{ResidentMin: 2 << 20, ResidentMax: most}, emm.InvalidArgument},
		{region.ObjectOptions{ResidentMax: 7 * 4096}, emm.InvalidArgument},
		{region.ObjectOptions{ResidentMin: -1}, emm.InvalidArgument},
		{region.ObjectOptions{ResidentMax: -1}, emm.InvalidArgument},
	} {
		if _, err := p.ObjectCreate(ctx, 64<<20, &c.o); !errors.Is(err, c.want) {
			return fmt.Errorf("%+v: %v, want %v", c.o, err, c.want)
		}
	}
	bounded, err := p.Allocate(ctx, 32<<20, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{ResidentMax: most}})
	if err != nil {
		return err
	}
	mem := bounded.Bytes()
	for i := 0; i < len(mem); i += 4096 {
		mem[i] = byte(i >> 12)
		if i%(1<<20) == 0 {
			if info, err := p.Info(ctx); err != nil || info.KernelResident > most {
				return fmt.Errorf("%d bytes resident, at most %d may be, %v", info.KernelResident, most, err)
			}
		}
	}
	kept, err := p.Allocate(ctx, least, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{ResidentMin: least}})
	if err != nil {
		return err
	}
	if err := kept.Populate(ctx, 0, least, true); err != nil {
		return err
	}
	hog, err := p.Allocate(ctx, 64<<20, nil)
	if err != nil {
		return err
	}
	other := hog.Bytes()
	for i := 0; i < len(other); i += 4096 {
		other[i] = 1
	}
	if n := kept.Stats().Resident; n != least {
		return fmt.Errorf("%d bytes are resident of an object that keeps %d", n, least)
	}
	if err := p.SetResident(ctx, least); !errors.Is(err, emm.ResourceShortage) {
		return fmt.Errorf("a budget below the minima: %v", err)
	}
	for i := 0; i < len(mem); i += 4096 {
		if mem[i] != byte(i>>12) {
			return fmt.Errorf("page %d: wrong", i>>12)
		}
	}
	return p.Close()
}
