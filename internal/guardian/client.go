package guardian

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
)

// Item is what the guardian holds for a pager that may die at any instant: a file descriptor, a few words, or both. Kind and ID name it.
type Item struct {
	Kind   ipc.ItemKind
	ID     uint64
	Parent uint64
	A, B   uint64
	Tail   []byte // at most ipc.MaxItemTail
	FD     int    // 0: none (nobody has his standard input held)
}

// Client is the pager's end of the link. Every method returns when the guardian has acknowledged; from any goroutine.
type Client struct {
	link *ipc.Link

	mu    sync.Mutex
	given []gift        // guarded by mu until all is closed; then Items'
	all   chan struct{} // closed when the guardian has given all that it holds
	count uint32        // before all is closed
	over  bool          // guarded by mu; all is closed
}

type gift struct {
	order uint32
	item  Item
}

// NewClient takes the pager's end of the link, whose hello has been read. f stays the caller's. stop is called once, on a goroutine of its own,
// when the guardian asks the pager to end in order. accepts tells whether this program could take over the state that another pager says it has, an ItemState; it is
// asked before an upgrade, and Items returns after that.
func NewClient(f *os.File, stop func(), accepts func(state Item) error, log *slog.Logger) (*Client, error) {
	conn, err := ipc.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("connect to guardian: %w", err)
	}
	c := &Client{all: make(chan struct{})}
	stop = sync.OnceFunc(stop) // a pager that becomes ready while the guardian stops may be asked twice
	c.link = ipc.NewLink(conn, &ipc.LinkOptions{Log: log, Handler: func(_ context.Context, m *ipc.Message) (ipc.Reply, error) {
		switch m.Type {
		case ipc.TypeStop:
			go stop()
			return ipc.Reply{}, nil
		case ipc.TypeGive:
			return ipc.Reply{}, c.take(m)
		case ipc.TypeGiven:
			return ipc.Reply{}, c.taken(m)
		case ipc.TypeOffer:
			g, tail, err := ipc.Decode[ipc.Give](m.Body)
			if err == nil {
				err = accepts(Item{Kind: g.Kind, ID: g.ID, A: g.A, B: g.B, Tail: tail})
			}
			return ipc.Reply{}, err
		}
		return ipc.Reply{}, fmt.Errorf("pager: %v: %w", m.Type, ipc.ErrUnknown)
	}})
	return c, nil
}

// take notes one item that an earlier pager has put.
func (c *Client) take(m *ipc.Message) error {
	g, tail, err := ipc.Decode[ipc.Give](m.Body)
	if err != nil {
		return err
	}
	i := Item{Kind: g.Kind, ID: g.ID, Parent: g.Parent, A: g.A, B: g.B, Tail: slices.Clone(tail)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return fmt.Errorf("pager: an item after all were given: %w", ipc.ErrMalformed)
	}
	if m.NumFDs() == 1 {
		i.FD = m.TakeFD(0)
	}
	c.given = append(c.given, gift{g.Order, i})
	return nil
}

func (c *Client) taken(m *ipc.Message) error {
	g, _, err := ipc.Decode[ipc.Given](m.Body)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return fmt.Errorf("pager: all were given before: %w", ipc.ErrMalformed)
	}
	c.over, c.count = true, g.Count
	close(c.all)
	return nil
}

// Items waits until the guardian has given all that it holds, and returns it in the order in which it was first put: what the pagers before this one had put and
// not dropped; nothing if there was none. The file descriptors are the caller's. To be called once, before the first Put.
func (c *Client) Items(ctx context.Context) ([]Item, error) {
	select {
	case <-c.all:
	case <-ctx.Done():
		return nil, fmt.Errorf("take over from guardian: %w", ctx.Err())
	case <-c.link.Done():
		return nil, fmt.Errorf("take over from guardian: %w", c.link.Err())
	}
	c.mu.Lock()
	given := c.given
	c.given = nil
	c.mu.Unlock()
	slices.SortFunc(given, func(a, b gift) int { return cmp.Compare(a.order, b.order) })
	items := make([]Item, len(given))
	for i, g := range given {
		items[i] = g.item
	}
	if len(items) != int(c.count) {
		CloseItems(items)
		return nil, fmt.Errorf("take over from guardian: %d items, and it says that it gave %d: %w", len(items), c.count, ipc.ErrMalformed)
	}
	return items, nil
}

// CloseItems closes the file descriptors of items that nobody wants.
func CloseItems(items []Item) {
	for i := range items {
		if items[i].FD > 0 {
			unix.Close(items[i].FD)
			items[i].FD = 0
		}
	}
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

// Resize has the guardian set the size of the frames' tmpfs, in bytes, for which it has the capability still: see frames.SetMountSize.
func (c *Client) Resize(ctx context.Context, mountfd, ctlfd int, size int64) error {
	fds := []int{mountfd}
	if ctlfd >= 0 {
		fds = append(fds, ctlfd)
	}
	return c.call(ctx, "resize tmpfs", ipc.TypeResize, ipc.Resize{Size: size}, &ipc.CallOptions{FDs: fds})
}

// Put has the guardian hold the item, or replace the one of the same kind and ID. The descriptor stays the caller's: the guardian has a copy.
func (c *Client) Put(ctx context.Context, i Item) error {
	if len(i.Tail) > ipc.MaxItemTail {
		return fmt.Errorf("hold item %d of kind %d: %d bytes of tail, at most %d: %w", i.ID, i.Kind, len(i.Tail), ipc.MaxItemTail, emm.InvalidArgument)
	}
	o := &ipc.CallOptions{Tail: i.Tail}
	if i.FD > 0 {
		o.FDs = []int{i.FD}
	}
	return c.call(ctx, "hold item", ipc.TypePut, ipc.Put{Kind: i.Kind, ID: i.ID, Parent: i.Parent, A: i.A, B: i.B}, o)
}

// Drop ends Put; of what the guardian does not hold it is no error. With an ItemTask go its socket and its ranges.
func (c *Client) Drop(ctx context.Context, kind ipc.ItemKind, id uint64) error {
	return c.call(ctx, "drop item", ipc.TypeDrop, ipc.Drop{Kind: kind, ID: id}, nil)
}

// Replace asks for an upgrade: another pager, of the program that is installed now. It returns only if there is none, and why.
func (c *Client) Replace(ctx context.Context) error {
	return c.call(ctx, "upgrade", ipc.TypeReplace, nil, nil)
}

// Done is closed when the guardian has gone.
func (c *Client) Done() <-chan struct{} { return c.link.Done() }

// Close ends the link.
func (c *Client) Close() error {
	err := c.link.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, g := range c.given {
		CloseItems([]Item{g.item})
	}
	c.given = nil
	return err
}
