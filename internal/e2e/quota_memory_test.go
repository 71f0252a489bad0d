package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["quotamemory"] = withPagerOf(spawn.Options{Resident: 32 << 20, Store: "memory", Quotas: spawn.Quotas{UserResident: 1 << 20, UserPaging: 2 << 20, TaskFaults: 8}}, quotaMemoryTask)
}

// quotaMemoryTask fills what a user may have of memory and of paging space, is told so by a fault, makes room, and goes on: also over the death of the pager, which the next one's quotas outlive.
func quotaMemoryTask(ctx context.Context, p *region.Pager) error {
	const most = 3 << 20
	o, r, err := create(ctx, p, 8<<20, nil, nil)
	if err != nil {
		return err
	}
	private, err := p.Allocate(ctx, 1<<20, nil)
	if err != nil {
		return err
	}
	stamp := func(b []byte, off int64) { // nothing that a store can make smaller
		x := rand.New(rand.NewPCG(uint64(off), 1))
		for i := 0; i < 4096; i += 8 {
			binary.LittleEndian.PutUint64(b[off+int64(i):], x.Uint64())
		}
	}
	check := func(from, to int64) error {
		want := make([]byte, 4096)
		got := make([]byte, 4096)
		for off := from; off < to; off += 4096 {
			for i, x := 0, rand.New(rand.NewPCG(uint64(off), 1)); i < 4096; i += 8 {
				binary.LittleEndian.PutUint64(want[i:], x.Uint64())
			}
			if _, err := r.ReadAt(got, off); err != nil {
				return fmt.Errorf("read at %d: %w", off, err)
			}
			if string(got) != string(want) {
				return fmt.Errorf("wrong bytes at %d", off)
			}
		}
		return nil
	}
	write := func(b []byte, off int64) error {
		return region.Guard(func() error { stamp(b, off); return nil })
	}
	// The first part is written to memory of vm_allocate, whose object the default pager gets with its first page-out: it counts, too.
	for off := int64(0); off < 1<<20; off += 4096 {
		if err := write(private.Bytes(), off); err != nil {
			return fmt.Errorf("write private memory at %d: %w", off, err)
		}
	}
	end := int64(0)
	for ; end < 8<<20; end += 4096 {
		if err = write(r.Bytes(), end); err != nil {
			break
		}
		if i := o.Size(); end+1<<20 > i {
			return errors.New("no quota was met")
		}
	}
	if !errors.Is(err, emm.ResourceShortage) {
		return fmt.Errorf("beyond the quotas, at %d: want a resource shortage, got %w", end, err)
	}
	if end+1<<20 > most+64<<10 || end+1<<20 < most-256<<10 {
		return fmt.Errorf("%d bytes could be written, want about %d", end+1<<20, most)
	}
	infos, err := p.Objects(ctx)
	if err != nil {
		return err
	}
	var resident, stored int64
	for _, i := range infos {
		resident, stored = resident+int64(i.Resident), stored+int64(i.Stored)
	}
	if resident > 1<<20 || stored > 2<<20 {
		return fmt.Errorf("%d bytes are resident, %d in paging space", resident, stored)
	}
	fill := func(what string) error {
		if err := private.Discard(ctx, 0, 256<<10); err != nil {
			return err
		}
		start := time.Now()
		for to := end + 128<<10; end < to; end += 4096 {
			err := write(r.Bytes(), end)
			for ; err != nil && time.Since(start) < 20*time.Second; err = write(r.Bytes(), end) {
				time.Sleep(20 * time.Millisecond) // page-out of this user's rests for up to a second
			}
			if err != nil {
				return fmt.Errorf("%s: there is room, and a write fails: %w", what, err)
			}
		}
		return check(0, end)
	}
	if err := fill("after a discard"); err != nil {
		return err
	}
	info, err := p.Info(ctx)
	if err != nil {
		return err
	}
	if err := syscall.Kill(info.PagerPID, syscall.SIGKILL); err != nil {
		return err
	}
	if err := check(0, end); err != nil {
		return fmt.Errorf("after the pager's death: %w", err)
	}
	for ; end < 8<<20 && err == nil; end += 4096 {
		err = write(r.Bytes(), end)
	}
	if !errors.Is(err, emm.ResourceShortage) {
		return fmt.Errorf("beyond the quotas of the next pager: want a resource shortage, got %w", err)
	}
	return nil
}

// TestQuotaMemory: what one user has resident and in paging space.
func TestQuotaMemory(t *testing.T) {
	t.Parallel() // it waits for two faults that fail after 5 s
	run(t, "quotamemory", nil, nil, nil)
}
