// Package e2e tests machpager end to end: real faults of real processes, answered by a pager in another one.
//
// The test process itself never touches paged memory. It starts tasks, which are this test binary again, told by argv[0] which task to run,
// and talks with them over their standard input and output. So a fault that nobody answers hangs a task and not the test, and the
// watchdog can ask every process that has to do with it for its stacks. A hang is a failure, and so is a task that ends in any
// other way than its test expects.
package e2e

import (
	"bufio"
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"machpager/region/spawn"
)

// argv0 of a task is this and the task's name.
const argv0 = "e2e-task:"

// tasks by name. A task that returns nil ends with status 0.
var tasks = map[string]func(c *conn) error{}

func TestMain(m *testing.M) {
	spawn.Main(managers()...)
	if name, ok := strings.CutPrefix(os.Args[0], argv0); ok {
		runTask(name)
	}
	os.Exit(m.Run())
}

func runTask(name string) {
	f := tasks[name]
	if f == nil {
		fmt.Fprintln(os.Stderr, "no task", name)
		os.Exit(3)
	}
	if err := f(newConn(os.Stdin, os.Stdout)); err != nil {
		fmt.Fprintf(os.Stderr, "task %s: %v\n", name, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// conn carries values between a test and a task.
type conn struct {
	enc *gob.Encoder
	dec *gob.Decoder
	w   *bufio.Writer
}

func newConn(r io.Reader, w io.Writer) *conn {
	b := bufio.NewWriter(w)
	return &conn{enc: gob.NewEncoder(b), dec: gob.NewDecoder(bufio.NewReader(r)), w: b}
}

func (c *conn) send(v any) error {
	if err := c.enc.Encode(v); err != nil {
		return fmt.Errorf("send %T: %w", v, err)
	}
	return c.w.Flush()
}

// recv fails with io.EOF when the other side has gone.
func (c *conn) recv(v any) error {
	if err := c.dec.Decode(v); err != nil {
		return fmt.Errorf("receive %T: %w", v, err)
	}
	return nil
}

// task is a child process, seen by its test.
type task struct {
	t    testing.TB
	name string
	cmd  *exec.Cmd
	c    *conn
	in   io.Closer

	dog    *time.Timer
	exited chan struct{} // closed when the process was waited for
	err    error         // of Wait; after exited

	mu     sync.Mutex
	stderr bytes.Buffer // guarded by mu
	bitten bool         // guarded by mu: the watchdog ended it
}

// Write takes the task's standard error.
func (k *task) Write(b []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stderr.Len() > 1<<20 {
		return len(b), nil
	}
	return k.stderr.Write(b)
}

// output is what the task has written to its standard error so far.
func (k *task) output() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.stderr.String()
}

// patience is how long a task may take unless its test says otherwise.
const patience = 60 * time.Second

// start runs a task in a process of its own, with a watchdog. edit, if not nil, changes the command before it is started.
func start(t testing.TB, name string, edit func(*exec.Cmd)) *task {
	return startFor(t, name, patience, edit)
}

func startFor(t testing.TB, name string, limit time.Duration, edit func(*exec.Cmd)) *task {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{argv0 + name}
	// A group of its own, so that a signal for a task's group does not meet the test.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	// Not StdoutPipe: Wait would close it under a reader.
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = pw
	k := &task{t: t, name: name, cmd: cmd, in: in, c: newConn(pr, in), exited: make(chan struct{})}
	cmd.Stderr = k
	cmd.WaitDelay = 5 * time.Second
	if edit != nil {
		edit(cmd)
	}
	err = cmd.Start()
	pw.Close()
	if err != nil {
		pr.Close()
		t.Fatalf("start task %s: %v", name, err)
	}
	k.dog = time.AfterFunc(limit, k.bite)
	go func() {
		k.err = cmd.Wait()
		k.dog.Stop()
		close(k.exited)
	}()
	t.Cleanup(func() {
		in.Close()
		select {
		case <-k.exited:
		case <-time.After(5 * time.Second):
			cmd.Process.Kill()
			<-k.exited
		}
		pr.Close()
		if t.Failed() && k.output() != "" {
			t.Logf("task %s said:\n%s", name, k.output())
		}
	})
	return k
}

// bite asks the task and all its descendants for their stacks, and then ends the task.
func (k *task) bite() {
	k.mu.Lock()
	k.bitten = true
	k.mu.Unlock()
	family := descendants(k.cmd.Process.Pid)
	for i := len(family) - 1; i >= 0; i-- {
		io.WriteString(k, stacks(family[i]))
	}
	// The task last: the others end when it does. What it says comes by its standard error.
	fmt.Fprintf(k, "watchdog: process %d: %s\n%s", k.cmd.Process.Pid, cmdline(k.cmd.Process.Pid), threads(k.cmd.Process.Pid))
	k.cmd.Process.Signal(syscall.SIGQUIT)
	time.Sleep(time.Second)
	k.cmd.Process.Kill()
}

// send and recv fail the test when the task has gone.
func (k *task) send(v any) {
	k.t.Helper()
	if err := k.c.send(v); err != nil {
		k.fail(err)
	}
}

func (k *task) recv(v any) {
	k.t.Helper()
	if err := k.c.recv(v); err != nil {
		k.fail(err)
	}
}

func (k *task) fail(err error) {
	k.t.Helper()
	k.in.Close()
	<-k.exited
	k.t.Fatalf("task %s: %v (%v)", k.name, err, k.err)
}

// wait expects the task to end well.
func (k *task) wait() {
	k.t.Helper()
	k.in.Close()
	if err := k.end(); err != nil {
		k.t.Fatalf("task %s: %v", k.name, err)
	}
}

// end waits for the task to end and tells how it did.
func (k *task) end() error {
	<-k.exited
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.bitten {
		return errors.New("hung, and was ended by the watchdog")
	}
	return k.err
}

// run is a task that is told arg, if not nil, and must end well. It returns when it has; result, if not nil, is what it sent.
func run(t testing.TB, name string, arg, result any, edit func(*exec.Cmd)) {
	t.Helper()
	k := start(t, name, edit)
	if arg != nil {
		k.send(arg)
	}
	if result != nil {
		k.recv(result)
	}
	k.wait()
}
