package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/region"
)

func init() {
	tasks["snapshot"] = withPager(snapshots)
	tasks["snapshoterrors"] = withPager(snapshotErrors)
	tasks["scribe"] = using(scribe)
	tasks["snapper"] = using(snapper)
}

func TestSnapshot(t *testing.T)       { run(t, "snapshot", nil, nil, nil) }
func TestSnapshotErrors(t *testing.T) { run(t, "snapshoterrors", nil, nil, nil) }

// snapshots makes objects of all page sizes, and generations of snapshots of them, which all go on being written.
func snapshots(ctx context.Context, p *region.Pager) error {
	type generation struct {
		o    *region.Object
		r    *region.Region
		want []byte
	}
	for _, pageSize := range []int{4096, 64 << 10, 2 << 20} {
		size := 5*pageSize + 100
		o, r, err := create(ctx, p, int64(size), &region.ObjectOptions{PageSize: pageSize}, nil)
		if err != nil {
			return err
		}
		family := []generation{{o, r, make([]byte, size)}}
		rng := rand.New(rand.NewPCG(1, uint64(pageSize)))
		for i := range 8 {
			for j, g := range family { // each is written in places, over some edges of pages, and some are paged out
				off := rng.IntN(size - 50)
				n := rng.IntN(min(size-off, 2*pageSize))
				fill(g.r.Bytes()[off:off+n], int64(off), uint64(i*100+j))
				fill(g.want[off:off+n], int64(off), uint64(i*100+j))
				if rng.IntN(3) == 0 {
					if err := g.r.PageOut(ctx, 0, int64(size)); err != nil {
						return err
					}
				}
			}
			g := family[rng.IntN(len(family))]
			o, err := g.o.Snapshot(ctx)
			if err != nil {
				return err
			}
			if o.Size() != int64(size) || o.PageSize() != pageSize || o.Port().IsNull() || o.Port() == g.o.Port() {
				return fmt.Errorf("a snapshot of %d bytes, page size %d, of one of %d, %d", o.Size(), o.PageSize(), size, pageSize)
			}
			again, err := p.ObjectOpen(ctx, o.Port())
			if err != nil {
				return err
			}
			r, err := again.Map(ctx, nil)
			if err != nil {
				return err
			}
			if err := again.Close(); err != nil {
				return err
			}
			family = append(family, generation{o, r, bytes.Clone(g.want)})
		}
		for len(family) > 0 {
			for i, g := range family {
				if err := sameBytes(fmt.Sprintf("page size %d, generation %d of %d", pageSize, i, len(family)), g.r.Bytes(), g.want); err != nil {
					return err
				}
			}
			i := rng.IntN(len(family))
			if err := firstOf(family[i].r.Close(), family[i].o.Close()); err != nil {
				return err
			}
			family = append(family[:i], family[i+1:]...)
		}
	}
	return pagingEmpty(ctx, p)
}

// pagingEmpty waits until nothing is in paging space: objects that have ended give it back in their own time.
func pagingEmpty(ctx context.Context, p *region.Pager) error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		i, err := p.Info(ctx)
		if err != nil || i.PagingFree == i.PagingTotal {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d bytes of paging space used at the end", i.PagingTotal-i.PagingFree)
		}
	}
}

func snapshotErrors(ctx context.Context, p *region.Pager) error {
	b, err := newBacking(10_000)
	if err != nil {
		return err
	}
	defer b.remove()
	file, r, err := mapFile(ctx, p, b.File, region.ObjectOptions{}, nil)
	if err != nil {
		return err
	}
	if _, err := file.Snapshot(ctx); !errors.Is(err, emm.InvalidArgument) {
		return fmt.Errorf("of a file: %v", err)
	}
	if err := firstOf(r.Close(), file.Close()); err != nil {
		return err
	}
	o, err := p.ObjectCreate(ctx, 10_000, nil)
	if err != nil {
		return err
	}
	if r, err = o.Map(ctx, nil); err != nil { // so that the pager has it
		return err
	}
	if err := firstOf(r.Close(), o.SetSize(ctx, 0)); err != nil {
		return err
	}
	if _, err := o.Snapshot(ctx); !errors.Is(err, emm.InvalidArgument) {
		return fmt.Errorf("of no bytes: %v", err)
	}
	if err := o.SetSize(ctx, 5_000); err != nil {
		return err
	}
	s, err := o.Snapshot(ctx)
	if err != nil {
		return err
	}
	if s.Size() != 5_000 {
		return fmt.Errorf("of an object of 5000 bytes now: %d", s.Size())
	}
	if r, err = s.Map(ctx, nil); err != nil {
		return err
	}
	if err := sameBytes("of an object that was never written", r.Bytes(), make([]byte, 5_000)); err != nil {
		return err
	}
	if err := firstOf(r.Close(), s.Close(), o.Close()); err != nil {
		return err
	}
	if _, err := o.Snapshot(ctx); !errors.Is(err, region.ErrClosed) {
		return fmt.Errorf("of a closed object: %v", err)
	}
	return nil
}

// The causal test: tasks write in turns, and every write is numbered. Number s goes to slot s%slots, so a snapshot in which s is the highest number must
// have, in every slot, the highest number up to s that belongs there.
const (
	scribeSlots = 509         // prime: the turns do not keep to a pattern
	scribeApart = 3*4096 + 24 // bytes from slot to slot: about a third of the pages has one
	scribeSize  = scribeSlots * scribeApart
)

type scribeArg struct {
	At
	Port emm.Port // null: make the object
	Time time.Duration
}

// turn is the right to write the numbers from First on.
type turn struct{ First, N uint64 }

// scribe writes when it is its turn. A second thread writes bytes that are nobody's all the time, in the same pages.
func scribe(ctx context.Context, c *conn, p *region.Pager, arg scribeArg) error {
	o, r, err := share(ctx, p, arg.Port, scribeSize, nil)
	if err != nil {
		return err
	}
	if err := c.send(o.Port()); err != nil {
		return err
	}
	mem := r.Bytes()
	var stop atomic.Bool
	var noise sync.WaitGroup
	noise.Go(func() {
		for i := 0; !stop.Load(); i++ {
			mem[i%scribeSlots*scribeApart+8] = byte(i)
			time.Sleep(20 * time.Microsecond)
		}
	})
	for {
		var u turn
		if err := c.recv(&u); err != nil {
			return err
		}
		if u.N == 0 {
			break
		}
		for s := u.First; s < u.First+u.N; s++ {
			binary.NativeEndian.PutUint64(mem[s%scribeSlots*scribeApart:], s)
		}
		if err := c.send(true); err != nil {
			return err
		}
	}
	stop.Store(true)
	noise.Wait()
	return firstOf(r.Close(), o.Close())
}

// prefix finds the highest number in a snapshot, and whether all before are there.
func prefix(mem []byte) (uint64, error) {
	high := uint64(0)
	for i := range uint64(scribeSlots) {
		high = max(high, binary.NativeEndian.Uint64(mem[i*scribeApart:]))
	}
	for i := range uint64(scribeSlots) {
		want := uint64(0)
		if back := (high%scribeSlots + scribeSlots - i) % scribeSlots; back < high {
			want = high - back
		}
		if got := binary.NativeEndian.Uint64(mem[i*scribeApart:]); got != want {
			return 0, fmt.Errorf("number %d is in, and slot %d has %d, want %d", high, i, got, want)
		}
	}
	return high, nil
}

// snapper takes snapshots, compares them, spoils some, and keeps some to see that they stay what they are.
func snapper(ctx context.Context, c *conn, p *region.Pager, arg scribeArg) error {
	o, err := p.ObjectOpen(ctx, arg.Port)
	if err != nil {
		return err
	}
	type kept struct {
		o    *region.Object
		high uint64
	}
	var keep []kept
	check := func(k kept) (uint64, error) {
		r, err := k.o.Map(ctx, nil)
		if err != nil {
			return 0, err
		}
		high, err := prefix(r.Bytes())
		if err == nil && k.high == 0 && high%3 == 0 { // the other objects must not see this
			for i := range scribeSlots {
				binary.NativeEndian.PutUint64(r.Bytes()[i*scribeApart:], 1<<60)
			}
		}
		return high, firstOf(err, r.Close())
	}
	n, last := 0, uint64(0)
	for end := time.Now().Add(arg.Time); n < 4 || last < 2*scribeSlots || time.Now().Before(end); n++ {
		s, err := o.Snapshot(ctx)
		if err != nil {
			return err
		}
		high, err := check(kept{o: s})
		if err != nil {
			return fmt.Errorf("snapshot %d: %w", n, err)
		}
		if high < last {
			return fmt.Errorf("snapshot %d has number %d, an earlier one had %d", n, high, last)
		}
		last = high
		if high%3 != 0 && len(keep) < 5 {
			keep = append(keep, kept{s, high})
			continue
		}
		if err := s.Close(); err != nil {
			return err
		}
		if len(keep) == 5 {
			for _, k := range keep {
				if high, err := check(k); err != nil || high != k.high {
					return fmt.Errorf("a snapshot that was kept: number %d, was %d: %w", high, k.high, err)
				}
				if err := k.o.Close(); err != nil {
					return err
				}
			}
			keep = keep[:0]
		}
	}
	for _, k := range keep {
		if err := k.o.Close(); err != nil {
			return err
		}
	}
	return firstOf(o.Close(), c.send(n))
}

// TestSnapshotCausal: if a write is in a snapshot, so is every earlier one, whichever task made it.
func TestSnapshotCausal(t *testing.T) {
	for _, resident := range []int64{64 << 20, 400 * 4096} { // all in memory, and a fifth
		for _, memory := range []bool{false, true} {
			t.Run(fmt.Sprintf("resident=%d/memory=%v", resident, memory), func(t *testing.T) {
				testCausal(t, pagerOptions{Resident: resident, Memory: memory})
			})
		}
	}
}

func testCausal(t *testing.T, o pagerOptions) {
	socket, _ := pagerAt(t, o)
	p := dial(t, socket)
	defer p.Close()
	arg := scribeArg{At: At{socket}, Time: soak(6*time.Second) / 4}
	var scribes []*task
	for range 3 {
		k := startFor(t, "scribe", arg.Time+patience, nil)
		k.send(arg)
		k.recv(&arg.Port)
		scribes = append(scribes, k)
	}
	s := startFor(t, "snapper", arg.Time+patience, nil)
	s.send(arg)
	var count int
	done := make(chan error, 1)
	go func() { done <- s.c.recv(&count) }()
	next := uint64(1)
	for i := 0; ; i++ {
		select {
		case err := <-done:
			if err != nil {
				s.fail(err)
			}
			for _, k := range scribes {
				k.send(turn{})
				k.wait()
			}
			s.wait()
			t.Logf("%d snapshots of %d writes", count, next)
			if err := pagingEmpty(t.Context(), p); err != nil {
				t.Error(err)
			}
			return
		default:
		}
		k, u, ok := scribes[i%len(scribes)], turn{next, uint64(i%7 + 1)}, false
		k.send(u)
		k.recv(&ok)
		next += u.N
	}
}
