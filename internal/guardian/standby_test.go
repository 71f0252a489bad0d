package guardian_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/guardian"
)

// standsBy waits for the stand-in pager, child of this process, that is not the one that serves.
func (s *setup) standsBy(serving int) int {
	s.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		for _, pid := range pagers() {
			if pid != serving {
				return pid
			}
		}
	}
	s.t.Fatalf("no pager stands by after %v", patience)
	return 0
}

// pagers are the stand-in pagers that this process has started and that have not ended.
func pagers() (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // state, ppid, ...: proc_pid_stat(5)
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if ppid, _ := strconv.Atoi(fields[1]); ppid == os.Getpid() && fields[0] != "Z" && strings.HasPrefix(cmdline(pid), pagerRole) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func cmdline(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return string(b)
}

// nobodyLeft is overTouched, and looks for pagers.
func (s *setup) nobodyLeft() {
	s.t.Helper()
	s.overTouched()
	if left := pagers(); len(left) > 0 {
		s.t.Errorf("pagers %v are left", left)
	}
}

// TestStandby: the pager that stands by follows, whenever one does; and whatever becomes of it, the one that serves goes on, and another follows.
func TestStandby(t *testing.T) {
	s := run(t, guardian.Options{Restarts: 5, Settled: time.Nanosecond, Standby: time.Millisecond}, "heir")
	s.task()
	pid := s.serving()
	for range 20 {
		heir := s.standsBy(pid)
		syscall.Kill(pid, syscall.SIGKILL)
		if next := s.serving(); next != heir {
			t.Errorf("pager %d follows, and %d stood by", next, heir)
			heir = next
		}
		pid = heir
	}
	// The standby dies: the pager stays, and there is another standby.
	dead := s.standsBy(pid)
	syscall.Kill(dead, syscall.SIGKILL)
	heir := s.standsBy(pid)
	for heir == dead {
		heir = s.standsBy(pid)
	}
	select {
	case other := <-s.ready:
		t.Errorf("pager %d serves, though only a standby has died", other)
	default:
	}
	// Both die, in either order.
	for i := range 10 {
		heir := s.standsBy(pid)
		both := []int{pid, heir}
		if i%2 == 0 {
			slices.Reverse(both)
		}
		for _, pid := range both {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		if pid = s.serving(); pid == heir {
			pid = s.serving() // it has served before it died
		}
	}
	s.nobodyLeft()
}

// TestStandbySaysNothing: what a pager says that only stands by does not count.
func TestStandbySaysNothing(t *testing.T) {
	s := run(t, guardian.Options{Restarts: 5, Settled: time.Nanosecond, Standby: time.Millisecond}, "eager")
	pid := s.serving()
	if got := s.line("eager"); got != "true" {
		t.Errorf("what the first pager says: %s", got)
	}
	heir := s.standsBy(pid)
	if got := s.line("eager"); got != "false" {
		t.Errorf("what the standby says: %s", got)
	}
	select {
	case other := <-s.ready:
		t.Errorf("pager %d serves, which only stands by", other)
	case <-time.After(50 * time.Millisecond):
	}
	syscall.Kill(pid, syscall.SIGKILL)
	if next := s.serving(); next != heir {
		t.Errorf("pager %d follows, and %d stood by", next, heir)
	}
	s.stop <- unix.SIGTERM
	s.stop <- unix.SIGTERM
	s.over()
	if left := pagers(); len(left) > 0 {
		t.Errorf("pagers %v are left", left)
	}
}

// TestStandbyUpgraded: a standby is of the program that serves.
func TestStandbyUpgraded(t *testing.T) {
	var s *setup
	var program atomic.Value
	hangup := make(chan os.Signal, 1)
	s = run(t, guardian.Options{Hangup: hangup, Restarts: 5, Settled: time.Nanosecond, Standby: time.Millisecond, TakeOver: 3 * time.Second, Upgrade: func() (func() *exec.Cmd, error) {
		p := program.Load().([]string)
		return func() *exec.Cmd { return s.pager("/proc/self/exe", p...) }, nil
	}}, "heir", "old")
	s.task()
	pid := s.serving()
	of := func(pid int, want string) {
		t.Helper()
		if got := cmdline(pid); !strings.Contains(got, want) {
			t.Errorf("process %d is %q, want %q", pid, got, want)
		}
	}
	// One that is refused: all stays.
	heir := s.standsBy(pid)
	program.Store([]string{"other"})
	syscall.Kill(pid, syscall.SIGUSR1)
	s.line("upgrade")
	syscall.Kill(pid, syscall.SIGKILL)
	if pid = s.serving(); pid != heir {
		t.Errorf("after an upgrade that was refused pager %d follows, and %d stood by", pid, heir)
	}
	// One that dies before it serves: the old program, and its standby.
	s.standsBy(pid)
	program.Store([]string{"broken"})
	hangup <- unix.SIGHUP
	pid = s.serving()
	of(pid, "old")
	of(s.standsBy(pid), "old")
	// And one that serves.
	program.Store([]string{"heir", "new"})
	hangup <- unix.SIGHUP
	pid = s.serving()
	of(pid, "new")
	heir = s.standsBy(pid)
	of(heir, "new")
	syscall.Kill(pid, syscall.SIGKILL)
	if pid = s.serving(); pid != heir {
		t.Errorf("pager %d follows, and %d stood by", pid, heir)
	}
	s.nobodyLeft()
}
