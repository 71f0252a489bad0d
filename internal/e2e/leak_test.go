package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"machpager/region"
)

func init() {
	tasks["cycles"] = using(cycles)
	tasks["careless"] = using(careless)
}

type cyclesArg struct {
	At
	N int
}

// cycles maps and unmaps, and counts what is left.
func cycles(ctx context.Context, c *conn, p *region.Pager, arg cyclesArg) error {
	cycle := func() error {
		o, r, err := create(ctx, p, 64<<10, nil, nil)
		if err != nil {
			return err
		}
		r.Bytes()[4096] = 1
		ro, err := o.Map(ctx, &region.MapOptions{ReadOnly: true})
		if err != nil {
			return err
		}
		if ro.Bytes()[4096] != 1 {
			return errors.New("wrong contents")
		}
		return firstOf(r.PageOut(ctx, 0, 8192), ro.Close(), o.Close(), r.Close())
	}
	for range 20 { // whatever is made once
		if err := cycle(); err != nil {
			return err
		}
	}
	if arg.Socket == "" {
		if err := settledStandby(os.Getpid()); err != nil {
			return err
		}
	}
	family := append([]int{os.Getpid()}, descendants(os.Getpid())...)
	before := make([]holdings, len(family))
	for i, pid := range family {
		before[i] = holdingsOf(pid)
	}
	goroutines := runtime.NumGoroutine()
	for range arg.N {
		if err := cycle(); err != nil {
			return err
		}
	}
	// What is freed in the background, and maps that the runtime makes for itself, are given a little room: a leak is one for each cycle.
	slack := max(16, arg.N/10)
	var left string
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		left = ""
		for i, pid := range family {
			h := holdingsOf(pid)
			if h.FDs > before[i].FDs || h.Maps > before[i].Maps+slack {
				left += fmt.Sprintf("process %d (%s): %+v, before %+v\n", pid, cmdline(pid), h, before[i])
			}
		}
		if g := runtime.NumGoroutine(); g > goroutines {
			left += fmt.Sprintf("%d goroutines, before %d\n", g, goroutines)
		}
		if now := descendants(os.Getpid()); len(now)+1 != len(family) {
			left += fmt.Sprintf("%d children, before %d\n", len(now), len(family)-1)
		}
		if left == "" {
			break
		}
	}
	if left != "" {
		return errors.New("left behind: " + left)
	}
	infos, err := p.Objects(ctx)
	if err != nil {
		return err
	}
	if arg.Socket == "" && len(infos) != 0 {
		return fmt.Errorf("%d objects are left, first %+v", len(infos), infos[0])
	}
	if err := p.Close(); err != nil {
		return err
	}
	if arg.Socket == "" && len(descendants(os.Getpid())) != 0 {
		return fmt.Errorf("children are left after Close: %v", descendants(os.Getpid()))
	}
	return nil
}

func TestNoLeaksInTask(t *testing.T) { run(t, "cycles", cyclesArg{N: 1000}, nil, nil) }

// careless maps memory, writes to it, and waits to be killed.
func careless(ctx context.Context, c *conn, p *region.Pager, _ At) error {
	for range 3 {
		r, err := p.Allocate(ctx, 1<<20, nil)
		if err != nil {
			return err
		}
		fill(r.Bytes(), 0, 1)
		if err := r.PageOut(ctx, 0, 1<<19); err != nil {
			return err
		}
	}
	_, r, err := create(ctx, p, 1<<20, &region.ObjectOptions{Manager: "faulty", Arg: modeStuck}, nil)
	if err != nil {
		return err
	}
	if err := c.send(true); err != nil {
		return err
	}
	return fmt.Errorf("read %d", r.Bytes()[0])
}

// TestNoLeaksInPager kills tasks that hold memory, and counts what the pager and the guardian keep of them.
func TestNoLeaksInPager(t *testing.T) {
	socket, k := pagerAt(t, pagerOptions{})
	once := func() {
		c := start(t, "careless", nil)
		c.send(At{socket})
		c.ready()
		eventually(t, 5*time.Second, "the task waits in a fault", func() bool { return faulting(c.cmd.Process.Pid) > 0 })
		c.cmd.Process.Kill()
		<-c.exited
	}
	for range 10 { // threads and whatever else is made once
		once()
	}
	if err := settledStandby(k.cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	family := descendants(k.cmd.Process.Pid)
	time.Sleep(200 * time.Millisecond)
	before := make([]holdings, len(family))
	for i, pid := range family {
		before[i] = holdingsOf(pid)
	}
	for range 30 {
		once()
	}
	for i, pid := range family {
		h := holdingsOf(pid)
		for end := time.Now().Add(5 * time.Second); h.FDs > before[i].FDs || h.Maps > before[i].Maps+20; h = holdingsOf(pid) {
			if time.Now().After(end) {
				t.Fatalf("process %d (%s) held %+v before, now %+v: %v", pid, cmdline(pid), before[i], h, fdsOf(pid))
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	var left []string
	eventually(t, 5*time.Second, "the objects of killed tasks are gone", func() bool {
		run(t, "objects", At{socket}, &left, nil)
		return len(left) == 0
	})
}

func init() {
	tasks["objects"] = using(func(ctx context.Context, c *conn, p *region.Pager, _ At) error {
		infos, err := p.Objects(ctx)
		if err != nil {
			return err
		}
		var s []string
		for _, i := range infos {
			s = append(s, fmt.Sprintf("%+v", i))
		}
		return c.send(s)
	})
}
