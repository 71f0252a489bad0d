//go:build linux

package demo

import (
	"bytes"
	"cmp"
	"context"
	"os"
	"slices"

	"machpager/region"
)

// leastBlock is the least that is read of a run at once, in bytes: with less, asking costs more than reading.
const leastBlock = 32 << 10

// mergeAll merges the runs of from until there is one, and returns the memory that it is in. More runs than can be read at once take several passes.
func (j *job) mergeAll(ctx context.Context, from, to *memory, runs []run) (*memory, error) {
	fanIn := int(max(2, j.budget/4/int64(j.workers)/leastBlock))
	j.res.Passes = 1
	for len(runs) > fanIn {
		j.res.Passes++
		var groups [][]run
		for g := range slices.Chunk(runs, fanIn) {
			groups = append(groups, g)
		}
		next := make([]run, len(groups))
		j.mu.Lock()
		j.total += int64(len(from.bytes))
		j.mu.Unlock()
		if err := from.advise(ctx, 0, int64(len(from.bytes)), region.Random); err != nil { // it says what it needs
			return nil, err
		}
		if err := to.advise(ctx, 0, int64(len(to.bytes)), region.Sequential); err != nil {
			return nil, err
		}
		err := j.each(ctx, len(groups), func(ctx context.Context, i int, _ *[]entry) error {
			g := groups[i]
			next[i] = run{a: g[0].a, b: g[len(g)-1].b}
			for _, r := range g {
				next[i].samples = append(next[i].samples, r.samples...)
			}
			return j.merge(ctx, from, to, g, next[i].a)
		})
		if err != nil {
			return nil, err
		}
		runs, from, to = next, to, from
	}
	return to, j.mergeLast(ctx, from, to, runs)
}

// mergeLast merges the runs into one, each worker the records of one range of keys.
func (j *job) mergeLast(ctx context.Context, from, to *memory, runs []run) error {
	if err := from.advise(ctx, 0, int64(len(from.bytes)), region.Random); err != nil {
		return err
	}
	splitters := j.splitters(runs)
	parts := make([][]run, len(splitters)+1)
	starts := make([]int64, len(parts)+1)
	err := j.each(ctx, len(runs), func(ctx context.Context, i int, _ *[]entry) error {
		at := runs[i].a
		for k := range parts {
			end := runs[i].b
			if k < len(splitters) {
				end = j.lowerBound(from.bytes, at, end, splitters[k])
			}
			j.mu.Lock()
			parts[k] = append(parts[k], run{a: at, b: end})
			starts[k+1] += end - at
			j.mu.Unlock()
			at = end
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	for k, p := range parts {
		slices.SortFunc(p, func(x, y run) int { return cmp.Compare(x.a, y.a) })
		starts[k+1] += starts[k]
		if err := to.advise(ctx, starts[k], starts[k+1], region.Sequential); err != nil {
			return err
		}
	}
	return j.each(ctx, len(parts), func(ctx context.Context, k int, _ *[]entry) error { return j.merge(ctx, from, to, parts[k], starts[k]) })
}

// splitters divides the keys into as many ranges as there are workers, about equally.
func (j *job) splitters(runs []run) (s [][]byte) {
	var all [][]byte
	for _, r := range runs {
		all = append(all, r.samples...)
	}
	slices.SortFunc(all, bytes.Compare)
	for k := 1; k < j.workers && len(all) > 0; k++ {
		s = append(s, all[len(all)*k/j.workers])
	}
	return s
}

// lowerBound is where the first record of the run [a, b) begins whose key is not less than key.
func (j *job) lowerBound(mem []byte, a, b int64, key []byte) int64 {
	for lo := a; a < b; {
		begin := j.back(mem, lo, a+(b-a)/2)
		end := j.end(mem, begin)
		if bytes.Compare(j.keyOf(mem[begin:end]), key) < 0 {
			a = end
		} else {
			b = begin
		}
	}
	return b
}

// cursor is where in a run a merge is.
type cursor struct {
	prefix    uint64
	at, end   int64 // of the record that is next; at == b: none
	b         int64
	populated int64
	needed    int64 // from here on: what is before was discarded
}

// merge merges parts of from that are in order into to, from out on. Of each part a block is read at a time, and discarded when it was used.
func (j *job) merge(ctx context.Context, from, to *memory, parts []run, out int64) error {
	page := int64(os.Getpagesize())
	block := max(j.budget/4/int64(j.workers*max(1, len(parts)))&^(page-1), page)
	cursors := make([]cursor, len(parts))
	for i, p := range parts {
		cursors[i] = cursor{at: p.a, end: p.a, b: p.b, populated: p.a, needed: p.a}
		if err := j.next(ctx, from, &cursors[i], block); err != nil {
			return err
		}
	}
	t := newLosers(len(cursors), func(x, y int) bool {
		c, d := &cursors[x], &cursors[y]
		switch {
		case c.at == c.b || d.at == d.b:
			return c.at < c.b
		case c.prefix != d.prefix:
			return c.prefix < d.prefix
		}
		if n := bytes.Compare(j.keyOf(from.bytes[c.at:c.end]), j.keyOf(from.bytes[d.at:d.end])); n != 0 {
			return n < 0
		}
		return x < y
	})
	counted := out
	for len(cursors) > 0 {
		c := &cursors[t.winner]
		if c.at == c.b {
			break
		}
		out += int64(copy(to.bytes[out:], from.bytes[c.at:c.end]))
		if out-counted >= 1<<16 {
			j.done.Add(out - counted)
			counted = out
		}
		if err := j.next(ctx, from, c, block); err != nil {
			return err
		}
		t.replay()
	}
	j.done.Add(out - counted)
	return nil
}

// next goes to the next record of a run.
func (j *job) next(ctx context.Context, from *memory, c *cursor, block int64) error {
	c.at = c.end
	if c.at+j.ahead() > c.populated && c.populated < c.b || c.at == c.b && c.needed < c.b {
		if err := from.discard(ctx, c.needed, c.at); err != nil {
			return err
		}
		c.needed = max(c.needed, c.at&^(int64(os.Getpagesize())-1)) // of a page that is used in part the rest goes with the next block
		end := min(c.b, max(c.populated, c.at)+block)
		if err := from.populate(ctx, c.populated, end); err != nil {
			return err
		}
		c.populated = end
	}
	if c.at < c.b {
		c.end = j.end(from.bytes, c.at)
		c.prefix = prefix(j.keyOf(from.bytes[c.at:c.end]))
	}
	return nil
}

// ahead is how far a record reaches, about.
func (f format) ahead() int64 {
	if f.lines {
		return 256
	}
	return int64(f.record)
}

// losers is a tournament of n players: each inner node remembers who lost there, so that the next winner is found with one game per level.
type losers struct {
	less   func(x, y int) bool
	nodes  []int
	n      int
	winner int
}

func newLosers(n int, less func(x, y int) bool) *losers {
	t := &losers{less: less, nodes: make([]int, n), n: n}
	if n > 0 {
		t.winner = t.play(1)
	}
	return t
}

// play fills the subtree of node i and returns its winner. Nodes n to 2n-1 are the players.
func (t *losers) play(i int) int {
	if i >= t.n {
		return i - t.n
	}
	x, y := t.play(2*i), t.play(2*i+1)
	if t.less(y, x) {
		x, y = y, x
	}
	t.nodes[i] = y
	return x
}

// replay plays the winner's games again, after it has changed.
func (t *losers) replay() {
	x := t.winner
	for i := (x + t.n) / 2; i > 0; i /= 2 {
		if t.less(t.nodes[i], x) {
			x, t.nodes[i] = t.nodes[i], x
		}
	}
	t.winner = x
}
