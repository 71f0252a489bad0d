package e2e

import (
	"context"
	"log/slog"
	"os"
	"testing"

	"machpager/internal/confine"
	"machpager/internal/daemon"
	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

// How tasks begin: with what they are told, a pager, and an object in memory.

// told is a task that is told A first.
func told[A any](f func(c *conn, arg A) error) func(*conn) error {
	return func(c *conn) error {
		var arg A
		if err := c.recv(&arg); err != nil {
			return err
		}
		return f(c, arg)
	}
}

// At is what a task is told that uses a pager, or a part of it. gob sends a field only if its name is exported.
type At struct {
	Socket string // "": start a pager
}

func (a At) open(ctx context.Context) (*region.Pager, error) {
	if a.Socket != "" {
		return region.Dial(ctx, a.Socket, nil)
	}
	return startPager(ctx, spawn.Options{Resident: 64 << 20})
}

// using is a task that is told A first, uses the pager it says, and closes that at the end.
func using[A interface {
	open(ctx context.Context) (*region.Pager, error)
}](f func(ctx context.Context, c *conn, p *region.Pager, arg A) error) func(*conn) error {
	return told(func(c *conn, arg A) error {
		ctx := context.Background()
		p, err := arg.open(ctx)
		if err != nil {
			return err
		}
		return firstOf(f(ctx, c, p, arg), p.Close())
	})
}

// withPager is a task that is told nothing, and has a pager of its own.
func withPager(f func(ctx context.Context, p *region.Pager) error) func(*conn) error {
	return withPagerOf(spawn.Options{Resident: 64 << 20}, f)
}

func withPagerOf(o spawn.Options, f func(ctx context.Context, p *region.Pager) error) func(*conn) error {
	return func(*conn) error {
		ctx := context.Background()
		p, err := startPager(ctx, o)
		if err != nil {
			return err
		}
		return firstOf(f(ctx, p), p.Close())
	}
}

// startPager starts a pager, confined whenever that can be had, whose log goes to the task's standard error.
func startPager(ctx context.Context, o spawn.Options) (*region.Pager, error) {
	o.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	if o.Confine == "" && confine.Have() == nil {
		o.Confine = daemon.ConfineAlways
	}
	return spawn.Start(ctx, &o)
}

// create makes an object, and maps it.
func create(ctx context.Context, p *region.Pager, size int64, opts *region.ObjectOptions, m *region.MapOptions) (*region.Object, *region.Region, error) {
	o, err := p.ObjectCreate(ctx, size, opts)
	if err != nil {
		return nil, nil, err
	}
	r, err := o.Map(ctx, m)
	return o, r, err
}

// share maps all of the object of a port, or where that is null, of one that it makes.
func share(ctx context.Context, p *region.Pager, port emm.Port, size int64, opts *region.ObjectOptions) (*region.Object, *region.Region, error) {
	if port.IsNull() {
		return create(ctx, p, size, opts, nil)
	}
	o, err := p.ObjectOpen(ctx, port)
	if err != nil {
		return nil, nil, err
	}
	r, err := o.Map(ctx, nil)
	return o, r, err
}

// await waits for the test's word to go on.
func (c *conn) await() error {
	var word bool
	return c.recv(&word)
}

// untilTold is a context that ends with the test's next word, or with the test.
func (c *conn) untilTold() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		c.await()
		cancel()
	}()
	return ctx
}

// ready waits for the task's word that it has begun, or has done what it was told.
func (k *task) ready() {
	k.t.Helper()
	var word bool
	k.recv(&word)
}

// dial is for tests: they touch no memory of the pager's. The caller closes it.
func dial(t testing.TB, socket string) *region.Pager {
	t.Helper()
	p, err := region.Dial(t.Context(), socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// infoOf must be told.
func infoOf(t testing.TB, p *region.Pager) region.Info {
	t.Helper()
	i, err := p.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return i
}
