//go:build linux

// Test tries the units of this folder's parent under a real systemd: it is what runs inside of the container that the script run starts (make systemd-test).
// It installs machpager by the commands of docs/operations.md, as they stand there, and does to the service what an operator and a bad day do.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"machpager/region"
)

func main() {
	asTask := flag.Bool("task", false, "be a task")
	userModeOnly := flag.Bool("user-mode-only", false, "be a task without privileges")
	only := flag.String("only", "", "the steps to take, by the beginnings of their names, apart by commas (default all)")
	flag.Parse()
	if *asTask {
		if err := task(region.DefaultSocket, *userModeOnly); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	if os.Getpid() == 1 || !inContainer() {
		fmt.Fprintln(os.Stderr, "this installs and ends services: run it in a container, by make systemd-test")
		os.Exit(2)
	}
	failed := 0
	for _, s := range steps {
		if *only != "" && !matches(s.name, *only) && s.name != steps[0].name {
			continue
		}
		start := time.Now()
		err := s.do()
		if err == nil {
			fmt.Printf("ok    %6.1f s  %s\n", time.Since(start).Seconds(), s.name)
			continue
		}
		failed++
		fmt.Printf("FAIL  %6.1f s  %s\n      %v\n", time.Since(start).Seconds(), s.name, err)
		status, _ := exec.Command("systemctl", "status", "--no-pager", "--full", "machpager.service", "machpager.socket").CombinedOutput()
		journal, _ := exec.Command("journalctl", "--no-pager", "-n", "20", "-u", "machpager.service").CombinedOutput()
		fmt.Printf("%s\n%s\n", status, journal)
		endTasks()
		exec.Command("systemctl", "reset-failed", "machpager.service").Run() // the next step says by itself whether it can begin
		exec.Command("systemctl", "start", "machpager.socket", "machpager.service").Run()
	}
	if failed > 0 {
		fmt.Printf("%d steps failed\n", failed)
		os.Exit(1)
	}
}

// inContainer reports whether this is a container that systemd-nspawn made.
func inContainer() bool {
	name, err := os.ReadFile("/run/systemd/container")
	return err == nil && strings.TrimSpace(string(name)) == "systemd-nspawn"
}

func matches(name, only string) bool {
	for p := range strings.SplitSeq(only, ",") {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// run runs a command and returns what it wrote.
func run(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// property is a property of the service, as systemctl show tells it.
func property(name string) string {
	out, err := run("systemctl", "show", "--value", "-p", name, "machpager.service")
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(out)
}

func wantProperty(name, want string) error {
	if got := property(name); got != want {
		return fmt.Errorf("%s of the service is %q, want %q", name, got, want)
	}
	return nil
}

// info is what machpager info says.
func info() (region.Info, error) {
	var i region.Info
	out, err := run("machpager", "info", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &i)
	}
	return i, err
}

// until waits until what is so.
func until(limit time.Duration, what string, so func() bool) error {
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		if so() {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not within %v: %s", limit, what)
		}
	}
}

// journal is what the service has written since, and reports whether a message is in it.
func journal(since time.Time, message string) error {
	var out string
	err := until(5*time.Second, fmt.Sprintf("%q in the journal", message), func() bool {
		out, _ = run("journalctl", "--no-pager", "-o", "cat", "-u", "machpager.service", "--since", since.Add(-time.Second).Format("2006-01-02 15:04:05"))
		return strings.Contains(out, message)
	})
	if err != nil {
		return fmt.Errorf("%w: it has %s", err, out)
	}
	return nil
}

// A member is a user of the group machpager, a stranger is not.
const (
	memberID   = 12345
	strangerID = 12346
)

// credential makes a process one of a user of no privileges, in the group machpager if member.
func credential(member bool) (*syscall.SysProcAttr, error) {
	c := &syscall.Credential{Uid: strangerID, Gid: strangerID}
	if member {
		g, err := user.LookupGroup("machpager")
		if err != nil {
			return nil, err
		}
		n, err := strconv.ParseUint(g.Gid, 10, 32)
		if err != nil {
			return nil, err
		}
		c = &syscall.Credential{Uid: memberID, Gid: memberID, Groups: []uint32{uint32(n)}}
	}
	return &syscall.SysProcAttr{Credential: c}, nil
}

// runAs runs a command as a member or a stranger, and returns its exit status.
func runAs(member bool, name string, args ...string) (out string, status int, err error) {
	c := exec.Command(name, args...)
	if c.SysProcAttr, err = credential(member); err != nil {
		return "", 0, err
	}
	b, err := c.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return string(b), exit.ExitCode(), nil
	}
	return string(b), 0, err
}

// aTask is a process that uses the pager.
type aTask struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// tasks are those that have not been told to end.
var tasks = map[*aTask]bool{}

// newTask starts a task: of root, or of a member.
func newTask(member bool, flags ...string) (*aTask, error) {
	t := &aTask{cmd: exec.Command("/proc/self/exe", append([]string{"-task"}, flags...)...)}
	if member {
		var err error
		if t.cmd.SysProcAttr, err = credential(true); err != nil {
			return nil, err
		}
	}
	in, err := t.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := t.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	t.cmd.Stderr = os.Stdout
	t.in, t.out = in, bufio.NewScanner(out)
	if err := t.cmd.Start(); err != nil {
		return nil, err
	}
	tasks[t] = true
	if line, err := t.line(); err != nil || line != "ready" {
		t.end()
		return nil, fmt.Errorf("a task does not start: %q, %v", line, err)
	}
	return t, nil
}

// line waits for a line of the task. One that says nothing for a minute is ended.
func (t *aTask) line() (string, error) {
	watch := time.AfterFunc(time.Minute, func() { t.cmd.Process.Kill() })
	defer watch.Stop()
	if !t.out.Scan() {
		return "", errors.New("the task has ended, or stood still for a minute")
	}
	return t.out.Text(), nil
}

// ask has the task do something, and returns its answer.
func (t *aTask) ask(what string) (string, error) {
	if _, err := fmt.Fprintln(t.in, what); err != nil {
		return "", err
	}
	return t.line()
}

// well is an error if the task cannot page its memory out, or does not find in it what was written.
func (t *aTask) well() error {
	answer, err := t.ask("check")
	if err == nil && answer != "ok" {
		err = errors.New(answer)
	}
	return err
}

// bereft ends a task whose pager is gone for good, after its memory was paged out. What was not touched since must be errors, and nothing may be anything else than errors
// and what was written.
func (t *aTask) bereft() error {
	answer, err := t.ask("touch")
	if err == nil && !strings.Contains(answer, "pages are errors") {
		err = fmt.Errorf("its memory was paged out, its pager is gone, and it says: %s", answer)
	}
	if err != nil {
		return err
	}
	fmt.Printf("      its task: %s\n", answer)
	t.end() // with an error, perhaps: what it can still do about its pager is not asked
	return nil
}

// end has the task end by itself, and kills it if it does not.
func (t *aTask) end() error {
	delete(tasks, t)
	t.in.Close()
	watch := time.AfterFunc(time.Minute, func() { t.cmd.Process.Kill() })
	defer watch.Stop()
	return t.cmd.Wait()
}

func endTasks() {
	for t := range tasks {
		t.cmd.Process.Signal(unix.SIGKILL)
		t.end()
	}
}
