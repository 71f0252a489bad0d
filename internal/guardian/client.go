package guardian

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"machpager/internal/ipc"
)

// Client is the pager's end of the link. Every method returns when the guardian has acknowledged; from any goroutine.
type Client struct{ link *ipc.Link }

// NewClient takes the pager's end of the link, whose hello has been read. f stays the caller's. stop is called, on a goroutine of its own, when the
// guardian asks the pager to end in order.
func NewClient(f *os.File, stop func(), log *slog.Logger) (*Client, error) {
	conn, err := ipc.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("connect to guardian: %w", err)
	}
	return &Client{ipc.NewLink(conn, &ipc.LinkOptions{Log: log, Handler: func(_ context.Context, m *ipc.Message) (ipc.Reply, error) {
		if m.Type != ipc.TypeStop {
			return ipc.Reply{}, fmt.Errorf("pager: %v: %w", m.Type, ipc.ErrUnknown)
		}
		go stop()
		return ipc.Reply{}, nil
	}})}, nil
}

func (c *Client) call(ctx context.Context, what string, t ipc.Type, body any, o *ipc.CallOptions) error {
	m, err := c.link.Call(ctx, t, body, o)
	if err != nil {
		return fmt.Errorf("%s: guardian: %w", what, err)
	}
	m.Close()
	return nil
}

// Ready tells the guardian that the pager serves.
func (c *Client) Ready(ctx context.Context) error {
	return c.call(ctx, "tell ready", ipc.TypeReady, nil, nil)
}

// PutTask has the guardian hold a copy of a task's userfaultfd and of its socket, under the number of its session.
func (c *Client) PutTask(ctx context.Context, session uint64, name string, uffd, socket int) error {
	err := c.call(ctx, "hold socket of task", ipc.TypePut, ipc.Put{Kind: itemSocket, ID: session}, &ipc.CallOptions{FDs: []int{socket}})
	if err != nil {
		return err
	}
	return c.call(ctx, "hold userfaultfd of task", ipc.TypePut, ipc.Put{Kind: ipc.ItemTask, ID: session},
		&ipc.CallOptions{FDs: []int{uffd}, Tail: []byte(name)})
}

// PutRange has the guardian hold a range registered on a task's userfaultfd, under the number of its mapping.
func (c *Client) PutRange(ctx context.Context, session, mapping uint64, r Range) error {
	return c.call(ctx, "hold range", ipc.TypePut, ipc.Put{Kind: ipc.ItemRange, ID: mapping, Parent: session, A: r.Start, B: r.Len}, nil)
}

// DropRange ends PutRange: the range is registered no more.
func (c *Client) DropRange(ctx context.Context, mapping uint64) error {
	return c.call(ctx, "drop range", ipc.TypeDrop, ipc.Drop{Kind: ipc.ItemRange, ID: mapping}, nil)
}

// DropTask ends PutTask: no memory is registered on its userfaultfd any more.
func (c *Client) DropTask(ctx context.Context, session uint64) error {
	return c.call(ctx, "drop task", ipc.TypeDrop, ipc.Drop{Kind: ipc.ItemTask, ID: session}, nil)
}

// EndTask hands the task to the guardian: the pager reads its userfaultfd no more, but its memory may live on. What is absent in it gives
// SIGBUS from now on.
func (c *Client) EndTask(ctx context.Context, session uint64) error {
	return c.call(ctx, "end task", ipc.TypePut, ipc.Put{Kind: itemEnd, ID: session}, nil)
}

// Done is closed when the guardian has gone.
func (c *Client) Done() <-chan struct{} { return c.link.Done() }

// Close ends the link.
func (c *Client) Close() error { return c.link.Close() }
