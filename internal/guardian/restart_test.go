package guardian_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/guardian"
)

// TestHandOver: a new pager is given what the old one had put, in that order, as it was at last.
func TestHandOver(t *testing.T) {
	s := run(t, guardian.Options{Restarts: 1}, "keeper")
	s.line("put")
	began := time.Now()
	s.kill()
	if got := s.line("kept"); got != "all" {
		t.Error(got)
	}
	t.Logf("%d items: %v from the kill on", manyItems, time.Since(began))
	s.stop <- unix.SIGTERM
	s.over()
}

// overTouched stops a guardian whose pagers are heirs, and expects that their task has done something.
func (s *setup) overTouched() {
	s.t.Helper()
	s.stop <- unix.SIGTERM
	var n int
	fmt.Sscan(s.line("touches"), &n)
	s.t.Logf("%d touches", n)
	if n == 0 {
		s.t.Error("the task did not touch anything")
	}
	s.over()
}

// TestHeirs: a task whose pager is killed again and again waits, and never sees anything but its data.
func TestHeirs(t *testing.T) {
	const kills = 40
	s := run(t, guardian.Options{Restarts: 5, Settled: time.Nanosecond}, "heir")
	s.task()
	for range kills {
		s.kill()
		time.Sleep(time.Duration(rand.IntN(5)) * time.Millisecond)
	}
	s.serving() // the last one lives
	time.Sleep(100 * time.Millisecond)
	s.overTouched()
}

// TestGiveUp: no pager follows after too many deaths in a row, or when the state is none that it can read.
func TestGiveUp(t *testing.T) {
	for _, c := range []struct {
		name     string
		restarts int
		status   int
		lives    int
	}{
		{"never", 0, 1, 1},
		{"twice", 2, 1, 3},
		{"state", 5, guardian.ExitState, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := run(t, guardian.Options{Restarts: c.restarts, Standby: time.Millisecond}, "quick", fmt.Sprint(c.status))
			if pid := s.serving(); c.restarts > 0 { // a standby changes nothing
				s.standsBy(pid)
				syscall.Kill(pid, syscall.SIGKILL)
			} else {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			err := s.end(patience)
			n := 0
			for range s.lines {
				n++
			}
			if n != c.lives {
				t.Errorf("%d pagers, want %d", n, c.lives)
			}
			exit := (*exec.ExitError)(nil)
			if !errors.As(err, &exit) {
				t.Fatalf("ended with %v", err)
			}
			if st := exit.Sys().(syscall.WaitStatus); c.lives > 1 && st.ExitStatus() != c.status {
				t.Errorf("ended with %v, want the status %d of the last pager", err, c.status)
			}
		})
	}
}

// TestStopWhileDying: the second signal ends a guardian whose pager dies at once whenever it is started.
func TestStopWhileDying(t *testing.T) {
	s := run(t, guardian.Options{Restarts: 1000}, "quick", "1")
	s.kill()
	for range 4 { // the delay is a second by now
		s.line("life")
	}
	s.stop <- unix.SIGTERM
	s.stop <- unix.SIGTERM
	if err := s.end(5 * time.Second); err != nil {
		t.Error(err)
	}
}

// TestUpgrade: a program that can take over does, by signal and when the pager asks; one that cannot, or is none, leaves the old pager in peace.
func TestUpgrade(t *testing.T) {
	var s *setup
	var program atomic.Value
	hangup := make(chan os.Signal, 1)
	s = run(t, guardian.Options{Hangup: hangup, Restarts: 1, Upgrade: func() (func() *exec.Cmd, error) {
		p := program.Load().([]string)
		if p[0] == "" {
			return nil, os.ErrNotExist
		}
		return func() *exec.Cmd { return s.pager(p[0], p[1:]...) }, nil
	}}, "heir")
	s.task()
	pid := <-s.ready
	for _, p := range [][]string{{"/proc/self/exe", "other"}, {"/bin/false", ""}, {"/nonexistent", ""}, {"", ""}} {
		program.Store(p)
		syscall.Kill(pid, syscall.SIGUSR1)
		if got := s.line("upgrade"); !strings.Contains(got, "upgrade: ") {
			t.Errorf("%v: %q", p, got)
		}
	}
	program.Store([]string{"/proc/self/exe", "heir", "new"})
	for i := range 20 {
		switch i % 3 {
		case 0:
			hangup <- unix.SIGHUP
		case 1:
			syscall.Kill(pid, syscall.SIGUSR1)
		default: // another of the new program follows
			if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); !strings.Contains(string(b), "new") {
				t.Errorf("process %d is %q", pid, b)
			}
			syscall.Kill(pid, syscall.SIGKILL)
		}
		next := s.serving()
		if next == pid {
			t.Error("the same pager is ready again")
		}
		pid = next
	}
	s.overTouched()
}

// TestUpgradeFails: a new program that says it can take over, and then dies or never serves, is followed by the old one.
func TestUpgradeFails(t *testing.T) {
	for _, program := range []string{"broken", "stuck"} {
		t.Run(program, func(t *testing.T) {
			var s *setup
			hangup := make(chan os.Signal, 1)
			s = run(t, guardian.Options{Hangup: hangup, Restarts: 3, TakeOver: 3 * time.Second, Upgrade: func() (func() *exec.Cmd, error) {
				return func() *exec.Cmd { return s.pager("/proc/self/exe", program) }, nil
			}}, "heir")
			s.task()
			pid := s.serving()
			hangup <- unix.SIGHUP
			next := s.serving()
			if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", next)); next == pid || !strings.Contains(string(b), "heir") {
				t.Errorf("process %d is %q, after %d; want another of the old program", next, b, pid)
			}
			s.overTouched()
		})
	}
}

// TestFull: the guardian holds no more file descriptors than leave room for its own work.
func TestFull(t *testing.T) {
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	limit := was
	limit.Cur = 512
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	s := run(t, guardian.Options{Restarts: 1}, "greedy")
	var held int
	var refused bool
	said := s.line("refused")
	fmt.Sscan(said, &held, &refused)
	if want := 512 - 512/8; held != want || !refused {
		t.Errorf("%q, want %d held and KERN_RESOURCE_SHORTAGE", said, want)
	}
	s.kill()
	s.serving()
	if got := s.line("left"); got != fmt.Sprint(held) {
		t.Errorf("%s items are left, want %d", got, held)
	}
	s.stop <- unix.SIGTERM
	s.over()
}

// TestClientGoes: the pager of a program serves it through its deaths, and the end of the program is the end of the guardian, also while there is no pager.
func TestClientGoes(t *testing.T) {
	before := fds(t)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	client := os.NewFile(uintptr(pair[1]), "client")
	defer client.Close()
	s := run(t, guardian.Options{Client: client, Restarts: 5, Settled: time.Nanosecond}, "owned")
	s.before = before
	var b [16]byte
	for range 5 {
		pid := s.serving()
		unix.Write(pair[0], []byte("ping"))
		if n, err := unix.Read(pair[0], b[:]); err != nil || string(b[:n]) != "ping" {
			t.Fatalf("the pager answers %q, %v", b[:n], err)
		}
		syscall.Kill(pid, syscall.SIGKILL)
	}
	unix.Close(pair[0])
	if err := s.end(patience); err != nil {
		t.Error(err)
	}
	client.Close()
	s.noMore()
}
