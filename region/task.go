//go:build linux

package region

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/uffd"
)

// taskFeatures are what a task's userfaultfd must be able to do. EVENT_REMAP is among them, so that a range moved by mremap(2) stays registered; the
// events of removal are not: while one is unread every fill fails.
const taskFeatures = uffd.RequiredFeatures

// setup is one attempt to open the task's userfaultfd and hand a copy to the pager.
type setup struct {
	done chan struct{} // closed when fd and err are there
	fd   *uffd.FD      // the task's own copy, kept until Pager.Close: closing the last copy would turn missing pages into zeros
	err  error
}

// taskUffd is the task's userfaultfd, opened at the first call. A failure is not kept: permissions may come.
func (p *Pager) taskUffd(ctx context.Context) (*uffd.FD, error) {
	p.setupMu.Lock()
	s := p.setup
	if s == nil {
		s = &setup{done: make(chan struct{})}
		p.setup = s
		// Not under ctx: once the pager may have it, another must not be sent. The call ends with the connection.
		go p.openUffd(s)
	}
	p.setupMu.Unlock()
	select {
	case <-s.done:
		return s.fd, s.err
	case <-ctx.Done():
		return nil, fmt.Errorf("hand the userfaultfd to the pager: %w", ctx.Err())
	}
}

func (p *Pager) openUffd(s *setup) {
	s.fd, s.err = p.newUffd()
	if s.err != nil {
		p.setupMu.Lock()
		p.setup = nil
		p.setupMu.Unlock()
	}
	close(s.done)
}

func (p *Pager) newUffd() (*uffd.FD, error) {
	o := &uffd.OpenOptions{Features: taskFeatures, UserModeOnly: p.options.UserModeOnly}
	fd, err := uffd.Open(o)
	if errors.Is(err, unix.EPERM) && p.device != nil {
		o.Device = p.device // the pager may open one, and was told to share that
		fd, err = uffd.Open(o)
	}
	if errors.Is(err, unix.EPERM) && p.device == nil {
		err = fmt.Errorf("%w; a pager can also hand out its own: `machpager serve --hand-out-userfaultfd`", err)
	}
	if err != nil {
		return nil, err
	}
	flags := uint32(0)
	if o.UserModeOnly {
		flags = ipc.HelloUserModeOnly
	}
	m, err := p.link.Call(context.Background(), ipc.TypeTaskUffd, ipc.TaskUffd{Features: uint64(fd.Features()), Flags: flags},
		&ipc.CallOptions{FDs: []int{fd.Fd()}})
	if err != nil {
		fd.Close()
		return nil, p.failed("hand the userfaultfd to the pager", err)
	}
	m.Close()
	return fd, nil
}

// closeUffd closes what taskUffd opened. Every Region is closed by then, and the connection ended.
func (p *Pager) closeUffd() {
	p.setupMu.Lock()
	s := p.setup
	p.setupMu.Unlock()
	if s != nil {
		if <-s.done; s.fd != nil {
			s.fd.Close()
		}
	}
	if p.device != nil {
		p.device.Close()
	}
}
