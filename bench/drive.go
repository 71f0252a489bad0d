//go:build linux

package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// jobLimit is how long one job may take: longer is a hang. A second is plenty.
const jobLimit = 60 * time.Second

// driven is the client process, seen from the driver.
type driven struct {
	ctx    context.Context
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    chan json.RawMessage
	broken chan error
	stderr strings.Builder
}

// startClient starts a client process in a role that [Main] knows, and waits until it is ready.
func startClient(ctx context.Context, role string, hello any) (*driven, error) {
	d := &driven{ctx: ctx, out: make(chan json.RawMessage, 1), broken: make(chan error, 1)}
	d.cmd = exec.Command("/proc/self/exe")
	d.cmd.Args = []string{argv0, role}
	d.cmd.Stderr = &d.stderr
	var err error
	if d.in, err = d.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the client: %w", err)
	}
	go func() {
		dec := json.NewDecoder(bufio.NewReader(out))
		for {
			var r json.RawMessage
			if err := dec.Decode(&r); err != nil {
				d.broken <- err
				return
			}
			d.out <- r
		}
	}()
	if err := d.call(hello, new(json.RawMessage)); err != nil {
		return nil, errors.Join(fmt.Errorf("start the client: %w", err), d.stop())
	}
	return d, nil
}

// do has one job done.
func (d *driven) do(j job) (result, error) {
	var r result
	err := d.call(j, &r)
	if err == nil && r.Err.Text != "" {
		err = r.Err
	}
	return r, err
}

// failure is an error of the client's, as it comes to the driver.
type failure struct {
	Text  string
	Errno unix.Errno // 0: none
}

func failed(err error) failure {
	f := failure{Text: err.Error()}
	errors.As(err, &f.Errno)
	return f
}

func (f failure) Error() string { return f.Text }

// Is finds the errno, and what it stands for (fs.ErrPermission, ...).
func (f failure) Is(target error) bool { return f.Errno != 0 && errors.Is(f.Errno, target) }

// call sends a line, and takes one into answer.
func (d *driven) call(v, answer any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if _, err := d.in.Write(append(line, '\n')); err != nil {
		return d.died(err)
	}
	t := time.NewTimer(jobLimit)
	defer t.Stop()
	select {
	case r := <-d.out:
		return json.Unmarshal(r, answer)
	case err := <-d.broken:
		return d.died(err)
	case <-t.C:
		return fmt.Errorf("no answer within %v: a fault hangs, or takes for ever", jobLimit)
	case <-d.ctx.Done():
		return context.Cause(d.ctx)
	}
}

// died tells why the client is gone.
func (d *driven) died(err error) error {
	_ = d.in.Close()
	_ = d.cmd.Wait()
	return fmt.Errorf("the client ended: %v (%w): %s", d.cmd.ProcessState, err, strings.TrimSpace(d.stderr.String()))
}

// stop ends the client, which may be in a fault, and tells what it complained about.
func (d *driven) stop() error {
	if d.cmd.ProcessState != nil {
		return nil
	}
	_ = d.in.Close()
	_ = d.cmd.Process.Kill()
	<-d.broken // all its output has been read
	_ = d.cmd.Wait()
	if d.stderr.Len() > 0 {
		return fmt.Errorf("the client said: %s", strings.TrimSpace(d.stderr.String()))
	}
	return nil
}
