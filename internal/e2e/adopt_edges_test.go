package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["mover"] = mover
	tasks["bereaved"] = using(bereaved)
	tasks["remembers"] = remembers
}

// mover moves a part of its memory with mremap(2), which it should not, and has its pager killed: the part is served where it is.
func mover(*conn) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	const page, size = 4096, 16 * 4096
	p, err := startPager(ctx, spawn.Options{Resident: 1 << 20, Restarts: restarts})
	if err != nil {
		return err
	}
	r, err := p.Allocate(ctx, size, nil)
	if err != nil {
		return err
	}
	fill(r.Bytes(), 0, 1)
	room, err := unix.MmapPtr(-1, 0, nil, 4*page, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	from := unsafe.Pointer(&r.Bytes()[4*page])
	if _, _, e := unix.Syscall6(unix.SYS_MREMAP, uintptr(from), 4*page, 4*page, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uintptr(room), 0); e != 0 {
		return fmt.Errorf("mremap: %w", e)
	}
	moved := unsafe.Slice((*byte)(room), 4*page)
	for v := uint64(1); v <= 3; v++ {
		if err := firstOf(check(moved, 4*page, v), r.PageOut(ctx, 0, size)); err != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond) // until the guardian knows
		if _, err := killPager(ctx, p); err != nil {
			return err
		}
		if err := firstOf(check(moved, 4*page, v), check(r.Bytes()[:4*page], 0, v), check(r.Bytes()[8*page:], 8*page, v)); err != nil {
			return fmt.Errorf("after kill %d: %w", v, err)
		}
		fill(moved, 4*page, v+1)
		fill(r.Bytes()[:4*page], 0, v+1)
		fill(r.Bytes()[8*page:], 8*page, v+1)
	}
	if err := p.Close(); err != nil {
		return err
	}
	if len(descendants(os.Getpid())) != 0 {
		return errors.New("children are left")
	}
	return nil
}

func TestMovedSurvives(t *testing.T) { run(t, "mover", nil, nil, nil) }

// bereaved has an object and memory of its own, half of it paged out, and then waits to be told to touch all of it. It tells what that came to.
func bereaved(ctx context.Context, c *conn, p *region.Pager, _ At) error {
	_, r, err := create(ctx, p, 1<<20, nil, nil)
	if err != nil {
		return err
	}
	fill(r.Bytes(), 0, 1)
	if err := firstOf(r.Wire(ctx, 0, 64<<10), r.PageOut(ctx, 512<<10, 512<<10), c.send(true)); err != nil {
		return err
	}
	if err := c.await(); err != nil {
		return err
	}
	out := ""
	if err := region.Guard(func() error { return check(r.Bytes()[512<<10:], 512<<10, 1) }); err != nil {
		out = fmt.Sprintf("%T ", err)
	}
	if err := region.Guard(func() error { return check(r.Bytes()[:512<<10], 0, 1) }); err != nil {
		out += fmt.Sprintf("resident: %v ", err)
	}
	if err := r.Populate(ctx, 0, 1<<20, false); !errors.Is(err, region.ErrPagerGone) {
		out += fmt.Sprintf("populate: %v", err)
	}
	return c.send(out)
}

// TestTaskDiesMeanwhile: what a task had that died between two pagers is given back by the second.
func TestTaskDiesMeanwhile(t *testing.T) {
	socket, _ := pagerAt(t, pagerOptions{Served: true, Dir: t.TempDir(), Restarts: restarts, NoStandby: true, Failpoints: "next:daemon.adopt.objects=1:sleep300ms"})
	p := dial(t, socket)
	defer p.Close()
	before := infoOf(t, p)
	held := guardianHolds(before.GuardianPID)
	k := start(t, "bereaved", nil)
	k.send(At{socket})
	k.ready()
	if err := syscall.Kill(before.PagerPID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	kill(t, k.cmd.Process.Pid)
	<-k.exited
	eventually(t, 10*time.Second, "nothing is left of the task", func() bool {
		i, err := p.Info(t.Context())
		return err == nil && i.PagerPID != before.PagerPID && i.Objects == 0 && i.Mappings == 0 && i.Resident == 0 && i.PagingFree == i.PagingTotal &&
			fmt.Sprint(guardianHolds(i.GuardianPID)) == fmt.Sprint(held)
	})
}

// TestKeepsDying: pagers that die while they take over are followed by others, until there are too many. Then what is resident stays, the rest and all calls are
// errors.
func TestKeepsDying(t *testing.T) {
	socket, _ := pagerAt(t, pagerOptions{Served: true, Dir: t.TempDir(), Restarts: 3, Failpoints: "daemon.adopt.sessions=1"})
	k := start(t, "bereaved", nil)
	k.send(At{socket})
	k.ready()
	p := dial(t, socket)
	defer p.Close()
	if _, err := killPager(t.Context(), p); !errors.Is(err, region.ErrPagerGone) {
		t.Errorf("after the last pager: %v", err)
	}
	k.send(true)
	var out string
	k.recv(&out)
	if out != "*region.FaultError " {
		t.Errorf("the task met %q", out)
	}
	k.wait()
}

// remembers has objects of two managers, of which one says that it remembers, and its pager killed.
func remembers(*conn) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	p, err := startPager(ctx, spawn.Options{Resident: 1 << 20, Restarts: restarts, Confine: "never"})
	if err != nil {
		return err
	}
	var regions []*region.Region
	for _, name := range []string{"steady", "faulty"} {
		r, err := p.Allocate(ctx, 64<<10, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{Manager: name, Arg: modeOK}})
		if err != nil {
			return err
		}
		if err := check(r.Bytes()[:32<<10], 0, 0); err != nil {
			return err
		}
		regions = append(regions, r)
	}
	if _, err := killPager(ctx, p); err != nil {
		return err
	}
	if err := check(regions[0].Bytes(), 0, 0); err != nil {
		return fmt.Errorf("of a manager that remembers: %w", err)
	}
	err = region.Guard(func() error { return check(regions[1].Bytes()[32<<10:], 32<<10, 0) })
	if fe := (*region.FaultError)(nil); !errors.As(err, &fe) {
		return fmt.Errorf("of a manager that does not remember: %w", err)
	}
	return firstOf(regions[0].Close(), regions[1].Close(), p.Close())
}

func TestManagerRemembers(t *testing.T) { run(t, "remembers", nil, nil, nil) }
