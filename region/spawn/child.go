//go:build linux

package spawn

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// closePatience bounds how long Pager.Close waits for the children to end.
const closePatience = 10 * time.Second

// guardianPatience is how long Pager.Close waits for the guardian when the pager has ended. More than that takes only a guardian that still answers for
// other tasks (and a process under the race detector, a second).
const guardianPatience = 2 * time.Second

// child is the guardian, seen by the program that started it.
type child struct {
	cmd    *exec.Cmd
	words  *words
	exited chan struct{} // closed when it was waited for and all it said was read
	err    error         // of Wait; after exited
}

// startChild starts the guardian with the socket as its fd 3. It is reaped when it ends, whoever waits.
func startChild(path string, socket *os.File, log *slog.Logger) (*child, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe for the log: %w", err)
	}
	c := &child{cmd: childCommand(path, roleGuardian), words: &words{log: log}, exited: make(chan struct{})}
	c.cmd.ExtraFiles = []*os.File{socket}
	c.cmd.Stdout, c.cmd.Stderr = w, w // a manager's prints must not mix with the program's
	err = c.cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("execute %s: %w", path, err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		c.words.read(r)
		r.Close()
	}()
	go func() {
		c.err = c.cmd.Wait()
		// Whoever else has the pipe (a process that a manager started) must not keep us.
		select {
		case <-read:
		case <-time.After(time.Second):
			r.SetReadDeadline(time.Now())
			<-read
		}
		close(c.exited)
	}()
	return c, nil
}

// explain adds to an error of the start what the child said before it ended.
func (c *child) explain(err error) error {
	if last := c.words.last(); last != "" {
		return fmt.Errorf("%w (the pager's last words: %s)", err, last)
	}
	if c.err != nil {
		return fmt.Errorf("%w (the pager: %w)", err, c.err)
	}
	return err
}

// waitClosed waits until the pager has ended. The guardian may go on: it answers for other tasks that still have memory.
func (c *child) waitClosed() error {
	limit := time.After(closePatience)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var gone time.Time
	for {
		select {
		case <-c.exited:
			if c.err != nil {
				return fmt.Errorf("wait for the pager's end: %w", c.explain(c.err))
			}
			return nil
		case <-limit:
			return fmt.Errorf("wait for the pager's end: process %d has not ended after %v (kill it, and its parent %d)", childOf(c.cmd.Process.Pid), closePatience,
				c.cmd.Process.Pid)
		case <-tick.C:
			switch {
			case childOf(c.cmd.Process.Pid) != 0:
				gone = time.Time{}
			case gone.IsZero():
				gone = time.Now()
			case time.Since(gone) > guardianPatience:
				return nil
			}
		}
	}
}

// childOf is a child of the guardian that lives: the pager, which need not be the one that there was at the start; 0: none. proc_tid_children(5). A
// kernel without CONFIG_PROC_CHILDREN shows none: then guardianPatience is the limit.
func childOf(parent int) int {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		for _, pid := range strings.Fields(string(b)) {
			// Field 3 of proc_pid_stat(5), behind the name in parentheses, is the state.
			stat, err := os.ReadFile("/proc/" + pid + "/stat")
			state := bytes.TrimLeft(stat[bytes.LastIndexByte(stat, ')')+1:], " ")
			if n, _ := strconv.Atoi(pid); err == nil && len(state) > 0 && state[0] != 'Z' {
				return n
			}
		}
	}
	return 0
}
