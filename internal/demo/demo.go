//go:build linux

// Package demo shows machpager at work: [Share] lets two processes share a file's contents through a memory object and checks every byte; [Sort] sorts more
// than the pager may keep in memory.
//
// Share's processes are this program again, told by argv[0] that they are: a program that calls Share calls [Main] first. They talk with Share in lines of
// JSON over their standard input and output, which is also how they get the object's port: it is a capability, and no place is less
// secret than argv.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// argv0 is what a process started by this package is called, and known by. argv[1] is its role.
const argv0 = "machpager[demo]"

// Main does the work of a task of the demonstration, if this process is one, and then does not return.
func Main() {
	if os.Args[0] != argv0 || len(os.Args) < 2 {
		return
	}
	if err := taskMain(context.Background(), newLines(os.Stdin, os.Stdout)); err != nil {
		fmt.Fprintf(os.Stderr, "%s %s: %v\n", argv0, os.Args[1], err)
		os.Exit(1)
	}
	os.Exit(0)
}

// lines carries values as lines of JSON.
type lines struct {
	dec *json.Decoder
	enc *json.Encoder
}

func newLines(r io.Reader, w io.Writer) *lines { return &lines{json.NewDecoder(r), json.NewEncoder(w)} }

// peer is a task process, seen by Share.
type peer struct {
	*lines
	role   string
	cmd    *exec.Cmd
	in     io.Closer
	stderr strings.Builder // of the process, complete after Wait

	once sync.Once
	err  error // of close, written inside once
}

// startPeer starts a task. It ends when ctx does.
func startPeer(ctx context.Context, role string) (*peer, error) {
	p := &peer{role: role, cmd: exec.CommandContext(ctx, "/proc/self/exe")}
	p.cmd.Args = []string{argv0, role}
	// A group of its own: Ctrl-C is for Share, which then ends the tasks.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = 5 * time.Second
	p.cmd.Stderr = &p.stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	p.in, p.lines = in, newLines(out, in)
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	return p, nil
}

// call sends a request and hands the reports about it to live until it is done.
func (p *peer) call(req request, live func(report)) (report, error) {
	if err := p.enc.Encode(req); err != nil {
		return report{}, p.lost(req.Do, err)
	}
	for {
		var r report
		if err := p.dec.Decode(&r); err != nil {
			return report{}, p.lost(req.Do, err)
		}
		if r.Err != "" {
			return r, fmt.Errorf("%s: %s: %w", p.role, req.Do, taskError{r.Err, r.Errno})
		}
		if r.Done {
			return r, nil
		}
		if live != nil {
			live(r)
		}
	}
}

// taskError is what a task has failed with.
type taskError struct {
	text  string
	errno unix.Errno // 0: none
}

func (e taskError) Error() string { return e.text }

// Is finds the errno, and what it stands for (fs.ErrPermission, ...).
func (e taskError) Is(target error) bool { return e.errno != 0 && errors.Is(e.errno, target) }

// lost says why a task does not answer.
func (p *peer) lost(do string, err error) error {
	if werr := p.close(); werr != nil {
		err = werr
	}
	return fmt.Errorf("%s: the %s is gone: %w", do, p.role, err)
}

// close ends the task and waits for it. Idempotent.
func (p *peer) close() error {
	p.once.Do(func() {
		p.in.Close()
		if p.err = p.cmd.Wait(); p.err != nil {
			p.err = fmt.Errorf("%s: %w: %s", p.role, p.err, strings.TrimSpace(p.stderr.String()))
		}
	})
	return p.err
}
