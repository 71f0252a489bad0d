package guardian

import (
	"context"
	"fmt"
	"time"

	"machpager/internal/ipc"
	"machpager/pager/emm"
)

// An upgrade starts the program anew, from the file that is there now, and has it look at what kind of state there is (the ItemState that the pager has put). If
// it can take that over, the old pager is killed, for it is made to be, and the new one is given everything, as after any death. If not, nothing has happened.

// offerLimit bounds the new program's start and its answer.
const offerLimit = 10 * time.Second

// upgrade is somebody who has asked for one; the zero upgrade is a signal.
type upgrade struct{ result chan error }

// answer tells who has asked why there was none.
func (u upgrade) answer(err error) {
	if u.result != nil {
		u.result <- err
	}
}

// ask asks for an upgrade on behalf of the pager. It returns only why there is none: after an upgrade nobody is left to be answered.
func (s *supervisor) ask(ctx context.Context) error {
	u := upgrade{make(chan error, 1)}
	select {
	case s.upgrade <- u:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-u.result:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// successor starts a pager of the program that is there now, and has it look at the state.
func (s *supervisor) successor() (*life, error) {
	if s.Upgrade == nil {
		return nil, fmt.Errorf("upgrade: this pager belongs to one program, and ends with it: %w", emm.InvalidArgument)
	}
	state, ok := s.table.state()
	if !ok {
		return nil, fmt.Errorf("upgrade: the pager has not said what kind of state it has: %w", emm.Failure)
	}
	command, err := s.Upgrade()
	if err != nil {
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	l, err := s.start(command, s.Hello)
	if err != nil {
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	l.command = command
	ctx, cancel := context.WithTimeout(context.Background(), offerLimit)
	defer cancel()
	m, err := l.link.Call(ctx, ipc.TypeOffer, ipc.Give{Kind: ipc.ItemState, A: state.a, B: state.b}, &ipc.CallOptions{Tail: state.tail})
	if err != nil {
		l.drop()
		return nil, fmt.Errorf("upgrade: the new program does not take over: %w", err)
	}
	m.Close()
	return l, nil
}

// state is what the pager has said of its state.
func (t *table) state() (item, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := t.items[key{ipc.ItemState, 0}]
	if i == nil {
		return item{}, false
	}
	return *i, true
}
