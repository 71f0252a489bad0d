//go:build linux

package demo

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"machpager/region"
)

// memory is what a sort works on: a region, or, to compare, plain memory. Where it says what it needs next and what it needs no more, plain memory does nothing.
type memory struct {
	bytes  []byte
	object *region.Object
	region *region.Region // nil: plain memory
}

func plainMemory(size int64) (*memory, error) {
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of plain memory: %w", size, err)
	}
	return &memory{bytes: b}, nil
}

func regionMemory(ctx context.Context, p *region.Pager, size int64) (*memory, error) {
	o, err := p.ObjectCreate(ctx, size, nil)
	if err != nil {
		return nil, err
	}
	r, err := o.Map(ctx, nil)
	if err != nil {
		return nil, err
	}
	return &memory{bytes: r.Bytes(), object: o, region: r}, nil
}

func (m *memory) close() error {
	if m.region == nil {
		return unix.Munmap(m.bytes)
	}
	if err := m.region.Close(); err != nil {
		return err
	}
	return m.object.Close()
}

// populate has [a, b) read in one go. A goroutine that waits here holds no P, as one that waits in a fault does.
func (m *memory) populate(ctx context.Context, a, b int64) error {
	if m.region == nil || a >= b {
		return ctx.Err()
	}
	return m.region.Populate(ctx, a, b-a, false)
}

func (m *memory) advise(ctx context.Context, a, b int64, advice region.Advice) error {
	if m.region == nil || a >= b {
		return nil
	}
	return m.region.Advise(ctx, a, b-a, advice)
}

// discard throws [a, b) away: it is not needed any more, so it need not be stored.
func (m *memory) discard(ctx context.Context, a, b int64) error {
	if m.region == nil || a >= b {
		return nil
	}
	return m.region.Discard(ctx, a, b-a)
}

// run is a part of memory whose records are in order.
type run struct {
	a, b    int64
	samples [][]byte // beginnings of some keys, evenly spread, ascending
}

// Of each run so many keys are kept to divide the work by, and so much of each.
const (
	samplesPerRun = 32
	sampleSize    = 64
)

// entry stands for a record while a run is made: the first bytes of its key, and where it is in its part.
type entry struct {
	prefix uint64
	off    uint32
	size   uint32
}

// entryShare bounds the entries of one run of lines, and by that the memory beside the region: 16 bytes for every 32.
const entryShare = 32

// makeRuns sorts each part of from, which ends at ends, into the same place in to. Each part is read once and then resident while it is sorted; to is written from
// beginning to end.
func (j *job) makeRuns(ctx context.Context, from, to *memory, ends []int64) ([]run, error) {
	var mu sync.Mutex
	var runs []run
	if err := to.advise(ctx, 0, int64(len(to.bytes)), region.Sequential); err != nil {
		return nil, err
	}
	err := j.each(ctx, len(ends), func(ctx context.Context, i int, scratch *[]entry) error {
		a, b := int64(0), ends[i]
		if i > 0 {
			a = ends[i-1]
		}
		if b-a > math.MaxUint32 {
			return fmt.Errorf("a line of more than %d bytes", uint32(math.MaxUint32))
		}
		if err := from.populate(ctx, a, b); err != nil {
			return err
		}
		for at := a; at < b; {
			end, entries := j.index(from.bytes[:b], at, (*scratch)[:0])
			*scratch = entries
			r := j.makeRun(from.bytes[at:end], to.bytes[at:end], entries)
			r.a, r.b = at, end
			mu.Lock()
			runs = append(runs, r)
			mu.Unlock()
			j.done.Add(end - at)
			at = end
		}
		return from.discard(ctx, a, b)
	})
	slices.SortFunc(runs, func(x, y run) int { return cmp.Compare(x.a, y.a) }) // equal keys stay in the order of their runs
	return runs, err
}

// index lists the records of b from at on, as many as one run may have.
func (j *job) index(b []byte, at int64, entries []entry) (end int64, _ []entry) {
	most := max(1, int(j.part/entryShare))
	first := at
	for at < int64(len(b)) && (len(entries) < most || !j.lines) {
		next := j.end(b, at)
		entries = append(entries, entry{prefix(j.keyOf(b[at:next])), uint32(at - first), uint32(next - at)})
		at = next
	}
	return at, entries
}

// makeRun writes the records of src into dst, in order; equal keys stay in the order they were in.
func (j *job) makeRun(src, dst []byte, entries []entry) (r run) {
	key := func(e entry) []byte { return j.keyOf(src[e.off : e.off+e.size]) }
	slices.SortFunc(entries, func(x, y entry) int {
		if x.prefix != y.prefix {
			return cmp.Compare(x.prefix, y.prefix)
		}
		if c := bytes.Compare(key(x), key(y)); c != 0 {
			return c
		}
		return cmp.Compare(x.off, y.off)
	})
	step, at := max(1, len(entries)/samplesPerRun), 0
	for i, e := range entries {
		if i%step == step/2 {
			k := key(e)
			r.samples = append(r.samples, bytes.Clone(k[:min(len(k), sampleSize)]))
		}
		at += copy(dst[at:], src[e.off:e.off+e.size])
	}
	return r
}
