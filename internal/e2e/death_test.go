package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	if os.Args[0] == argv0+"orphan" {
		runtime.LockOSThread() // the main thread stays with the main goroutine, for no other to end on
	}
	tasks["stuck"] = told(stuckTask)
	tasks["signalled"] = signalled
	tasks["orphan"] = told(orphan)
	tasks["blocked"] = touching(modeStuck)
}

const stuckReaders = 8

type stuckArg struct{ Guard bool }

// stuckResult is what one reader met.
type stuckResult struct {
	Fault bool   // a *region.FaultError
	Err   string // "" if the copy went through
}

// stuckTask reads memory whose manager never answers.
func stuckTask(c *conn, arg stuckArg) error {
	ctx := context.Background()
	p, err := startPager(ctx, spawn.Options{Restarts: -1})
	if err != nil {
		return err
	}
	info, err := p.Info(ctx)
	if err != nil {
		return err
	}
	if err := c.send(info.PagerPID); err != nil {
		return err
	}
	const chunk = 64 << 10
	o, r, err := create(ctx, p, stuckReaders*chunk, &region.ObjectOptions{Manager: "faulty", Arg: modeStuck}, nil)
	if err != nil {
		return err
	}
	results := make(chan stuckResult, stuckReaders)
	for g := range stuckReaders {
		go func() {
			buf := make([]byte, chunk)
			read := func() error { copy(buf, r.Bytes()[g*chunk:]); return nil }
			if !arg.Guard {
				read()
				results <- stuckResult{}
				return
			}
			err := region.Guard(read)
			var fe *region.FaultError
			res := stuckResult{Fault: errors.As(err, &fe)}
			if err != nil {
				res.Err = err.Error()
			}
			results <- res
		}()
	}
	go func() {
		time.Sleep(100 * time.Millisecond)
		runtime.GC()
	}()
	all := make([]stuckResult, stuckReaders)
	for i := range all {
		all[i] = <-results
	}
	if err := c.send(all); err != nil {
		return err
	}
	// Every call now says that the pager is gone, and none hangs.
	buf := make([]byte, 10)
	calls := map[string]func() error{
		"ReadAt":       func() error { _, err := r.ReadAt(buf, 5*chunk); return err },
		"WriteAt":      func() error { _, err := r.WriteAt(buf, 5*chunk); return err },
		"PageOut":      func() error { return r.PageOut(ctx, 0, chunk) },
		"Populate":     func() error { return r.Populate(ctx, 0, chunk, false) },
		"ObjectCreate": func() error { _, err := p.ObjectCreate(ctx, 4096, nil); return err },
	}
	said := map[string]string{}
	for name, f := range calls {
		if err := f(); err != nil {
			said[name] = err.Error()
		}
	}
	if err := c.send(said); err != nil {
		return err
	}
	r.Close()
	o.Close()
	p.Close()
	return nil
}

// TestPagerKilled kills the pager while all the readers wait in faults, and a collection waits for the readers: no goroutine of the task can
// run, so only the guardian can end it.
func TestPagerKilled(t *testing.T) {
	for _, procs := range []int{2, stuckReaders + 4} {
		for _, guard := range []bool{true, false} {
			t.Run(fmt.Sprintf("guard=%t/GOMAXPROCS=%d", guard, procs), func(t *testing.T) {
				k := start(t, "stuck", func(c *exec.Cmd) {
					c.Env = append(os.Environ(), "GOMAXPROCS="+strconv.Itoa(procs), "GOTRACEBACK=single")
				})
				k.send(stuckArg{guard})
				var pager int
				k.recv(&pager)
				pid := k.cmd.Process.Pid
				eventually(t, 20*time.Second, "the readers wait in faults", func() bool { return faulting(pid) >= min(procs, stuckReaders) })
				time.Sleep(300 * time.Millisecond) // the collection begins, and waits
				killed := time.Now()
				kill(t, pager)
				if !guard {
					err := k.end()
					if d := time.Since(killed); d > time.Second {
						t.Errorf("the task ended after %v", d)
					}
					if err == nil || !strings.Contains(k.output(), "SIGBUS") {
						t.Fatalf("the task ended with %v, want SIGBUS; it said:\n%s", err, k.output())
					}
					return
				}
				var all []stuckResult
				k.recv(&all)
				if d := time.Since(killed); d > time.Second {
					t.Errorf("the readers got their errors after %v", d)
				}
				for i, res := range all {
					if !res.Fault {
						t.Errorf("reader %d: %q, want a *FaultError", i, res.Err)
					}
				}
				var said map[string]string
				k.recv(&said)
				for _, name := range []string{"ReadAt", "WriteAt", "PageOut", "Populate", "ObjectCreate"} {
					if !strings.Contains(said[name], "pager is gone") {
						t.Errorf("%s says %q, want that the pager is gone", name, said[name])
					}
				}
				k.wait()
			})
		}
	}
}

func kill(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatalf("kill %d: %v", pid, err)
	}
}

// signalled is a program that shuts down in good order on a signal: it looks at all its memory again, most of it paged out.
func signalled(c *conn) error {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	ctx := context.Background()
	p, err := startPager(ctx, spawn.Options{})
	if err != nil {
		return err
	}
	r, err := p.Allocate(ctx, 1<<20, nil)
	if err != nil {
		return err
	}
	want := make([]byte, 1<<20)
	fill(want, 0, 7)
	copy(r.Bytes(), want)
	if err := r.PageOut(ctx, 0, 1<<20); err != nil {
		return err
	}
	if err := c.send(true); err != nil {
		return err
	}
	<-sig
	time.Sleep(200 * time.Millisecond) // a pager that had taken the signal for its own would be gone by now
	if !bytes.Equal(r.Bytes(), want) {
		return errors.New("wrong contents after the signal")
	}
	if err := r.PageOut(ctx, 0, 1<<20); err != nil {
		return err
	}
	if !bytes.Equal(r.Bytes(), want) {
		return errors.New("wrong contents after the second page-out")
	}
	return p.Close()
}

// TestSignals sends what a terminal and a service manager send: the signal meets the whole process group.
func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			k := start(t, "signalled", nil)
			k.ready()
			pid := k.cmd.Process.Pid
			family := descendants(pid)
			if len(family) == 0 {
				t.Fatal("the task has no children")
			}
			for _, p := range append([]int{-pid}, family...) { // to the group, and to each child as well
				if err := syscall.Kill(p, sig); err != nil {
					t.Fatal(err)
				}
			}
			k.wait()
			allGone(t, family)
		})
	}
}

func allGone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		for end := time.Now().Add(5 * time.Second); alive(pid); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				for _, pid := range slices.Backward(pids) { // the pager before its guardian, which ends with it
					if alive(pid) {
						t.Error(stacks(pid))
					}
				}
				t.Fatal("not gone within 5 s")
			}
		}
	}
}

type orphanArg struct{ EndThread bool }

// orphan starts a pager, from a thread that then ends if it is told so, writes and pages out for ever, and tells when it has begun.
func orphan(c *conn, arg orphanArg) error {
	ctx := context.Background()
	var p *region.Pager
	var err error
	var tid int
	started := make(chan struct{})
	go func() {
		defer close(started)
		if arg.EndThread {
			runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
			tid = syscall.Gettid()
		}
		p, err = startPager(ctx, spawn.Options{})
	}()
	<-started
	if err != nil {
		return err
	}
	if arg.EndThread {
		if tid == os.Getpid() {
			return errors.New("the goroutine ran on the main thread, which does not end")
		}
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid)); err != nil {
				break
			}
			if time.Now().After(end) {
				return errors.New("the thread that started the pager does not end")
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	r, err := p.Allocate(ctx, 1<<20, nil)
	if err != nil {
		return err
	}
	want := make([]byte, 1<<20)
	for v := uint64(0); ; v++ {
		fill(want, 0, v)
		copy(r.Bytes(), want)
		if err := r.PageOut(ctx, 0, 1<<20); err != nil {
			return err
		}
		if !bytes.Equal(r.Bytes(), want) {
			return errors.New("wrong contents")
		}
		if v == 3 {
			if err := c.send(true); err != nil || arg.EndThread {
				return firstOf(err, p.Close())
			}
		}
	}
}

// TestStartingThreadEnds: the pager must not be bound to the thread that started it (PR_SET_PDEATHSIG is).
func TestStartingThreadEnds(t *testing.T) {
	run(t, "orphan", orphanArg{EndThread: true}, nil, func(c *exec.Cmd) { c.Env = append(os.Environ(), "GOMAXPROCS=4") })
}

// TestParentKilled: a program that is killed takes its pager with it.
func TestParentKilled(t *testing.T) {
	k := start(t, "orphan", nil)
	k.send(orphanArg{})
	k.ready()
	family := descendants(k.cmd.Process.Pid)
	if len(family) == 0 {
		t.Fatal("the task has no children")
	}
	k.cmd.Process.Kill()
	<-k.exited
	allGone(t, family)
}

// touching touches a page, without Guard, of a manager in a mode in which it cannot be had.
func touching(mode string) func(*conn) error {
	return withPager(func(ctx context.Context, p *region.Pager) error {
		_, r, err := create(ctx, p, 4096, &region.ObjectOptions{Manager: "faulty", Arg: mode}, nil)
		if err != nil {
			return err
		}
		return fmt.Errorf("read %d", r.Bytes()[0])
	})
}

// TestBlockedTaskDies: a task that waits in a fault dies of a signal as any other, and its pager goes with it.
func TestBlockedTaskDies(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			k := start(t, "blocked", nil)
			pid := k.cmd.Process.Pid
			eventually(t, 20*time.Second, "the task waits in a fault", func() bool { return faulting(pid) > 0 })
			family := descendants(pid)
			syscall.Kill(pid, sig)
			err := k.end()
			var ee *exec.ExitError
			if !errors.As(err, &ee) || ee.Sys().(syscall.WaitStatus).Signal() != sig {
				t.Errorf("the task ended with %v, want %v", err, sig)
			}
			allGone(t, family)
		})
	}
}
