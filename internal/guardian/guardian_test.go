package guardian_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/guardian"
)

// The test process is the guardian, by guardian.Run. The pager is a stand-in (pager_test.go) that reads faults and answers none, and starts a real
// task (task_test.go), whose report comes in on the standard output that all share.

func TestMain(m *testing.M) {
	switch os.Args[0] {
	case pagerRole:
		exit(pagerMain(os.Args[1:]))
	case workerRole:
		exit(workerMain())
	case taskRole:
		exit(taskMain())
	}
	os.Exit(m.Run())
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, os.Args[0], err)
		os.Exit(1)
	}
	os.Exit(0)
}

const patience = 20 * time.Second

// setup is one guardian with its pager.
type setup struct {
	t      *testing.T
	before map[string]int // fds
	out    *os.File       // where the lines come from; closed when the guardian has ended
	lines  chan string
	ended  chan error // of Run
	ready  chan int
	stop   chan os.Signal
}

// begin runs a guardian whose stand-in pager has these arguments, and which starts no other.
func begin(t *testing.T, grace time.Duration, args ...string) *setup {
	t.Helper()
	return run(t, guardian.Options{Grace: grace}, args...)
}

func run(t *testing.T, o guardian.Options, args ...string) *setup {
	t.Helper()
	before := fds(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s := &setup{t: t, before: before, out: w, lines: make(chan string, 100), ended: make(chan error, 1), ready: make(chan int, 1000), stop: make(chan os.Signal, 3)}
	o.Command = func() *exec.Cmd { return s.pager("/proc/self/exe", args...) }
	o.Hello, o.Stop, o.Ready = []byte("hello"), s.stop, func(pid int) { s.ready <- pid }
	go func() {
		defer close(s.lines)
		for sc := bufio.NewScanner(r); sc.Scan(); {
			s.lines <- sc.Text()
		}
		r.Close()
	}()
	go func() {
		s.ended <- guardian.Run(o)
		w.Close()
	}()
	return s
}

// pager is the command of a stand-in pager.
func (s *setup) pager(path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path)
	cmd.Args = append([]string{pagerRole}, args...)
	cmd.Stdout, cmd.Stderr = s.out, os.Stderr
	return cmd
}

// line waits for the next line that begins with what, and returns its rest.
func (s *setup) line(what string) string {
	s.t.Helper()
	limit := time.After(patience)
	for {
		select {
		case l, ok := <-s.lines:
			if !ok {
				s.t.Fatalf("no %q: everybody has gone", what)
			}
			if rest, ok := strings.CutPrefix(l, what+" "); ok {
				return rest
			}
		case <-limit:
			s.t.Fatalf("no %q in %v", what, patience)
		}
	}
}

// end waits for Run.
func (s *setup) end(limit time.Duration) error {
	s.t.Helper()
	select {
	case err := <-s.ended:
		return err
	case <-time.After(limit):
		s.t.Fatalf("the guardian has not ended after %v", limit)
		return nil
	}
}

// over expects that Run ends well, and that nothing is left of it.
func (s *setup) over() {
	s.t.Helper()
	if err := s.end(patience); err != nil {
		s.t.Error(err)
	}
	s.noMore()
}

// serving waits for the next pager that serves, and returns its pid.
func (s *setup) serving() int {
	s.t.Helper()
	select {
	case pid := <-s.ready:
		return pid
	case <-time.After(patience):
		s.t.Fatalf("no pager serves in %v", patience)
		return 0
	}
}

// pid of a task, to be killed at the latest when the test ends.
func (s *setup) task() int {
	s.t.Helper()
	var pid int
	if _, err := fmt.Sscan(s.line("task"), &pid); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
	return pid
}

// kill ends the pager as a crash would.
func (s *setup) kill() {
	s.t.Helper()
	syscall.Kill(s.serving(), syscall.SIGKILL)
}

func (s *setup) report() report {
	s.t.Helper()
	var r report
	if err := json.Unmarshal([]byte(s.line("report")), &r); err != nil {
		s.t.Fatal(err)
	}
	return r
}

// fds are the file descriptors of this process by what they are.
func fds(t *testing.T) map[string]int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]int{}
	for _, e := range d {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil { // the directory's own is closed
			if kind, _, ok := strings.Cut(to, ":["); ok && kind != "anon_inode" {
				to = kind
			}
			m[to]++
		}
	}
	return m
}

// noMore fails if there are more file descriptors than before, of any kind that a guardian has to do with (and not
// the runtime: it makes its own when it first needs them).
func (s *setup) noMore() {
	s.t.Helper()
	for range s.lines { // until nobody writes any more
	}
	after := fds(s.t)
	for _, kind := range []string{"socket", "pipe", "anon_inode:[userfaultfd]", "anon_inode:[pidfd]"} {
		if after[kind] > s.before[kind] {
			s.t.Errorf("%s: %d before, %d after", kind, s.before[kind], after[kind])
		}
	}
}

// TestPagerKilled is what a guardian is for: every thread that waits in a fault, and every one that comes later, gets SIGBUS (EFAULT in a system call)
// when the pager dies, although a collection has stopped the task's whole Go runtime: in milliseconds, on a loaded machine under the race detector in
// seconds. What was there stays right, and can be written.
func TestPagerKilled(t *testing.T) {
	s := begin(t, 0, "silent")
	s.task()
	s.line("waiting")
	killed := time.Now()
	s.kill()
	r := s.report()
	took := time.Since(killed)
	t.Logf("%v after the kill: %+v", took, r)
	if took > 5*time.Second {
		t.Errorf("the last thread went on %v after the kill, want within 5 s", took)
	}
	checkReport(t, r)
	// The task lives, but has unmapped everything.
	err := s.end(5 * time.Second)
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || !strings.Contains(err.Error(), "killed") {
		t.Errorf("Run ended with %v, want to hear of the kill", err)
	}
	s.noMore()
}

func checkReport(t *testing.T, r report) {
	t.Helper()
	if r.Faults != r.Touches || r.Touches == 0 {
		t.Errorf("%d of %d touches of missing pages ended with SIGBUS, want all", r.Faults, r.Touches)
	}
	if r.Read != "bad address" {
		t.Errorf("read(2) into a missing page: %q, want EFAULT", r.Read)
	}
	if r.Later != 3 {
		t.Errorf("%d of 3 later touches ended with SIGBUS, want all", r.Later)
	}
	if !r.Resident || !r.Written {
		t.Errorf("a resident page: as it was %v, written %v; want both", r.Resident, r.Written)
	}
	if !r.Hangup {
		t.Error("the socket of the task was not shut down")
	}
}

// TestPagerEnds: an end in order with nothing left is the end of the guardian.
func TestPagerEnds(t *testing.T) {
	begin(t, 0, "drop").over()
}

// TestEndTask: a task that has left while its memory lives on is the guardian's, though the pager lives.
func TestEndTask(t *testing.T) {
	s := begin(t, 0, "endtask")
	s.task()
	s.line("waiting")
	checkReport(t, s.report())
	select {
	case err := <-s.ended:
		t.Fatalf("the pager has ended: %v", err)
	default:
	}
	s.stop <- unix.SIGTERM
	if err := s.end(patience); err != nil {
		t.Error(err)
	}
}

// TestTaskKilled: nobody waits for a task that is gone.
func TestTaskKilled(t *testing.T) {
	s := begin(t, 0, "silent")
	pid := s.task()
	s.line("waiting")
	syscall.Kill(pid, syscall.SIGKILL)
	s.kill()
	if err := s.end(5 * time.Second); err == nil {
		t.Error("no word of the pager's death")
	}
}

// TestStop: a pager that does not end when asked is ended after the grace; then everything is poisoned, and the guardian goes though the task lives.
func TestStop(t *testing.T) {
	s := begin(t, 200*time.Millisecond, "silent")
	s.task()
	s.line("waiting")
	s.stop <- unix.SIGTERM
	checkReport(t, s.report())
	if err := s.end(patience); err != nil {
		t.Error(err)
	}
}

// TestStartFails: a pager that cannot be executed, or dies at once.
func TestStartFails(t *testing.T) {
	if err := guardian.Run(guardian.Options{Command: func() *exec.Cmd { return exec.Command("/nonexistent") }}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want that there is no such file", err)
	}
	if err := begin(t, 0, "unheard of").end(patience); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("got %v, want the exit status", err)
	}
}

// TestBadItems: what makes no sense is refused, and nothing is kept of it.
func TestBadItems(t *testing.T) {
	s := begin(t, 0, "bad")
	for n := s.line("refused"); n != "all"; n = s.line("refused") {
		t.Log(n)
	}
	if err := s.end(patience); err != nil {
		t.Error(err)
	}
}
