package guardian

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"

	"machpager/internal/ipc"
	"machpager/pager/emm"
)

// life is one pager process and the link to it.
type life struct {
	cmd     *exec.Cmd
	link    *ipc.Link
	ready   chan struct{}    // filled when the pager serves
	status  chan error       // filled when the process was waited for
	command func() *exec.Cmd // what makes more of it; nil: what made the others
	current atomic.Bool      // it is the one that serves, or is about to: what it says counts
}

// start starts a pager. It is given nothing yet.
func (s *supervisor) start(command func() *exec.Cmd, hello []byte) (*life, error) {
	conn, theirs, err := pair(hello)
	if err != nil {
		return nil, fmt.Errorf("start pager: %w", err)
	}
	l := &life{cmd: command(), ready: make(chan struct{}, 1), status: make(chan error, 1)}
	l.link = ipc.NewLink(conn, &ipc.LinkOptions{Handler: s.handler(l), Log: s.Log})
	l.cmd.ExtraFiles = []*os.File{theirs}
	if s.Client != nil {
		l.cmd.ExtraFiles = append(l.cmd.ExtraFiles, s.Client)
	} else if s.Listener != nil {
		l.cmd.ExtraFiles = append(l.cmd.ExtraFiles, s.Listener)
	}
	err = l.cmd.Start()
	theirs.Close()
	if err != nil {
		l.link.Close()
		return nil, fmt.Errorf("start pager: %w", err)
	}
	go func() { l.status <- l.cmd.Wait() }()
	return l, nil
}

// drop ends a pager that was never given anything.
func (l *life) drop() {
	if l == nil {
		return
	}
	l.cmd.Process.Kill()
	l.link.Close()
	<-l.status
}

// handler serves the pager's end of the link.
func (s *supervisor) handler(l *life) ipc.Handler {
	return func(ctx context.Context, m *ipc.Message) (ipc.Reply, error) {
		if !l.current.Load() {
			return ipc.Reply{}, fmt.Errorf("guardian: %v of a pager that stands by: %w", m.Type, emm.Failure)
		}
		switch m.Type {
		case ipc.TypePut:
			p, tail, err := ipc.Decode[ipc.Put](m.Body)
			if err == nil {
				err = s.table.put(p, tail, m)
			}
			return ipc.Reply{}, err
		case ipc.TypeDrop:
			d, _, err := ipc.Decode[ipc.Drop](m.Body)
			if err == nil {
				err = s.table.drop(d)
			}
			return ipc.Reply{}, err
		case ipc.TypeReady:
			select {
			case l.ready <- struct{}{}:
			default:
			}
			return ipc.Reply{}, nil
		case ipc.TypeResize:
			q, _, err := ipc.Decode[ipc.Resize](m.Body)
			if err == nil {
				err = s.table.mount.resize(q.Size, m)
			}
			return ipc.Reply{}, err
		case ipc.TypeReplace:
			return ipc.Reply{}, s.ask(ctx)
		}
		return ipc.Reply{}, fmt.Errorf("guardian: %v: %w", m.Type, ipc.ErrUnknown)
	}
}
