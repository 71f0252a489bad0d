package guardian_test

import (
	"context"

	"machpager/internal/guardian"
	"machpager/internal/ipc"
)

// putTask has the guardian hold a copy of a task's userfaultfd and of its socket, under the number of its session.
func putTask(ctx context.Context, c *guardian.Client, session uint64, name string, uffd, socket int) error {
	if err := c.Put(ctx, guardian.Item{Kind: ipc.ItemSocket, ID: session, FD: socket}); err != nil {
		return err
	}
	return c.Put(ctx, guardian.Item{Kind: ipc.ItemTask, ID: session, Tail: []byte(name), FD: uffd})
}

// putRange has the guardian hold a range registered on a task's userfaultfd, under the number of its mapping.
func putRange(ctx context.Context, c *guardian.Client, session, mapping uint64, r guardian.Range) error {
	return c.Put(ctx, guardian.Item{Kind: ipc.ItemRange, ID: mapping, Parent: session, A: r.Start, B: r.Len})
}

// dropRange ends putRange: the range is registered no more.
func dropRange(ctx context.Context, c *guardian.Client, mapping uint64) error {
	return c.Drop(ctx, ipc.ItemRange, mapping)
}

// dropTask ends putTask: no memory is registered on its userfaultfd any more.
func dropTask(ctx context.Context, c *guardian.Client, session uint64) error {
	return c.Drop(ctx, ipc.ItemTask, session)
}

// endTask hands the task to the guardian: the pager reads its userfaultfd no more, but its memory may live on. What is absent in it gives
// SIGBUS from now on.
func endTask(ctx context.Context, c *guardian.Client, session uint64) error {
	return c.Put(ctx, guardian.Item{Kind: ipc.ItemEnd, ID: session})
}
