package guardian

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"machpager/internal/ipc"
)

const (
	// giveLimit bounds the giving of all items to a new pager.
	giveLimit = 30 * time.Second
	// giveAtOnce is how many items are under way.
	giveAtOnce = 32
)

// give gives a new pager all that is held, each item with a copy of its fd, and then says that it was all. Nothing changes meanwhile.
func (t *table) give(link *ipc.Link) error {
	ctx, cancel := context.WithTimeout(context.Background(), giveLimit)
	defer cancel()
	t.mu.Lock()
	t.giving = true
	keys := make([]key, 0, len(t.items))
	for k := range t.items {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int { return cmp.Compare(t.items[a].order, t.items[b].order) })
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		t.giving = false
		t.mu.Unlock()
	}()

	var (
		wg    sync.WaitGroup
		slots = make(chan struct{}, giveAtOnce)
		mu    sync.Mutex
		first error
	)
	for n, k := range keys {
		if ctx.Err() != nil {
			break
		}
		i := t.items[k] // giving: nobody changes it
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			o := &ipc.CallOptions{Tail: i.tail}
			if i.fd >= 0 {
				o.FDs = []int{i.fd}
			}
			m, err := link.Call(ctx, ipc.TypeGive, ipc.Give{Kind: k.kind, Order: uint32(n), ID: k.id, Parent: i.parent, A: i.a, B: i.b}, o)
			if err == nil {
				m.Close()
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if first == nil {
				first = err
				cancel()
			}
		})
	}
	wg.Wait()
	if first != nil {
		return fmt.Errorf("give pager what is held: %w", first)
	}
	t.mu.Lock()
	t.giving = false // the pager may answer to the last message with a Put
	t.mu.Unlock()
	m, err := link.Call(ctx, ipc.TypeGiven, ipc.Given{Count: uint32(len(keys))}, nil)
	if err != nil {
		return fmt.Errorf("give pager what is held: %w", err)
	}
	m.Close()
	return nil
}
