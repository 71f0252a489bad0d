package pager

import (
	"context"
	"fmt"
	"slices"
	"time"

	"machpager/pager/store"
)

// Problem is a broken invariant of paging space.
type Problem struct {
	Object int   // as ObjectInfo has it; -1: of no object
	Off    int64 // bytes; where in the object, -1: nowhere in particular
	What   string
}

// Checked is what Check has looked at.
type Checked struct {
	Objects   int   `json:"objects"`
	Pages     int64 `json:"stored_pages"`
	Bytes     int64 `json:"bytes_read"`
	Slots     int64 `json:"slots"`     // that page maps name, shared ones once
	Shared    int64 `json:"shared"`    // of those: named by several maps
	Uncounted int   `json:"uncounted"` // counts that changed whenever they were taken
}

const (
	checkRead  = 1 << 20 // bytes read at once
	checkTries = 40
	checkPause = 5 * time.Millisecond
	checkSame  = 5 // a count is wrong when it was by the same amount so often in a row
)

// Check reads every stored page back, which checks its checksum, and holds the page maps against each other and against the store's count of slots: no slot is used
// twice, but for pages that snapshots share, and none is used by nobody. A store that is a store.Checker is asked, too. It goes on beside everything else, behind what somebody waits for. problem is called for each
// broken invariant, on the caller's goroutine. ctx ends it early.
func (p *Pager) Check(ctx context.Context, problem func(Problem)) (c Checked, err error) {
	for _, o := range p.live() {
		c.Objects++
		if err := o.checkContents(ctx, &c, problem); err != nil {
			return c, fmt.Errorf("check contents of object %d: %w", o.id, err)
		}
	}
	if err := p.checkNames(ctx, &c, problem); err != nil {
		return c, fmt.Errorf("check slots: %w", err)
	}
	if err := p.checkUsed(ctx, &c, problem); err != nil {
		return c, fmt.Errorf("count slots: %w", err)
	}
	if s, ok := p.store.(store.Checker); ok {
		compared, err := s.Check(ctx, func(what string) { problem(Problem{-1, -1, what}) })
		if err != nil {
			return c, fmt.Errorf("check store: %w", err)
		}
		if !compared {
			c.Uncounted++
		}
	}
	return c, nil
}

// live are the objects that can be named.
func (p *Pager) live() []*object {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []*object
	for _, o := range p.ids {
		if o != nil && p.objects[o.port] == o {
			list = append(list, o)
		}
	}
	return list
}

// stored is a run of pages that are stored in a run of slots.
type stored struct {
	page int64
	slot store.Slot
	n    int // slots
}

// chunkRuns are the runs of a chunk of the map, none longer than most slots. Called with mu.
func (o *object) chunkRuns(c, most int) (list []stored) {
	most = max(most/o.unit, 1) * o.unit
	words := o.chunk(c)
	for i := range words {
		w := words[i].Load()
		if w == 0 {
			continue
		}
		page, slot := int64(c*chunkPages+i), wordSlot(w)
		if k := len(list) - 1; k >= 0 && list[k].slot+store.Slot(list[k].n) == slot && list[k].page+int64(list[k].n/o.unit) == page && list[k].n+o.unit <= most {
			list[k].n += o.unit
			continue
		}
		list = append(list, stored{page, slot, o.unit})
	}
	return list
}

// each calls f for the runs of each chunk of the map, without mu; the caller is a reader of the slots meanwhile. It ends when f is false, or the object ends.
func (o *object) each(most int, f func(run stored) bool) {
	for c := 0; ; c++ {
		o.mu.Lock()
		for c < len(o.counts) && o.counts[c] == 0 {
			c++
		}
		if o.gone || c >= len(o.counts) {
			o.mu.Unlock()
			return
		}
		runs, epoch := o.chunkRuns(c, most), o.enter()
		o.mu.Unlock()
		for _, r := range runs {
			if !f(r) {
				o.leave(epoch)
				return
			}
		}
		o.leave(epoch)
	}
}

// checkContents reads what is stored.
func (o *object) checkContents(ctx context.Context, c *Checked, problem func(Problem)) (err error) {
	done := make(chan struct{}, 1)
	op := store.Op{Prefetch: true, Done: func(*store.Op) { done <- struct{}{} }}
	buf := make([]byte, max(checkRead, o.pageSize))
	o.each(len(buf)/store.SlotSize, func(r stored) bool {
		if err = ctx.Err(); err != nil {
			return false
		}
		c.Pages += int64(r.n / o.unit)
		for r.n > 0 {
			op.Slot, op.Data = r.slot, buf[:r.n*store.SlotSize]
			o.p.store.Read(&op)
			<-done
			c.Bytes += int64(len(op.Data))
			if op.Err == nil {
				break
			}
			bad := int64(op.Good / o.unit)
			problem(Problem{o.id, (r.page + bad) * o.pageSize, fmt.Sprintf("stored page cannot be read back: %v", op.Err)})
			skip := (bad + 1) * int64(o.unit)
			r.page, r.slot, r.n = r.page+bad+1, r.slot+store.Slot(skip), r.n-int(skip)
		}
		return true
	})
	return err
}

// slotSet is a set of slots.
type slotSet map[store.Slot]*[shareSlots / 64]uint64

// add reports whether the slot was in it already.
func (s slotSet) add(slot store.Slot) bool {
	g := s[slot/shareSlots]
	if g == nil {
		g = new([shareSlots / 64]uint64)
		s[slot/shareSlots] = g
	}
	i, bit := slot%shareSlots/64, uint64(1)<<(slot%64)
	had := g[i]&bit != 0
	g[i] |= bit
	return had
}

// namer is that a map names a run of slots for a page.
type namer struct {
	o    *object
	page int64
	slot store.Slot // the first
}

// still reports whether it does now.
func (n namer) still() bool {
	n.o.mu.Lock()
	defer n.o.mu.Unlock()
	return !n.o.gone && wordSlot(n.o.word(n.page)) == n.slot
}

// maps is how many maps the page that begins with slot is counted for.
func (s *shares) maps(slot store.Slot) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g := s.groups[slot/shareSlots]; g != nil {
		return int(g.more[slot%shareSlots]) + 1
	}
	return 1
}

// checkNames looks for slots that are named more than once, and holds their number against the share counts.
func (p *Pager) checkNames(ctx context.Context, c *Checked, problem func(Problem)) error {
	seen, twice := slotSet{}, map[store.Slot][]namer{} // twice: by each slot of a run
	objects := p.live()
	walk := func(f func(n namer, slot store.Slot)) error {
		for _, o := range objects {
			o.each(chunkPages*o.unit, func(r stored) bool {
				for i := range r.n {
					f(namer{o, r.page + int64(i/o.unit), r.slot + store.Slot(i/o.unit*o.unit)}, r.slot+store.Slot(i))
				}
				return ctx.Err() == nil
			})
		}
		return ctx.Err()
	}
	err := walk(func(_ namer, slot store.Slot) {
		if seen.add(slot) {
			twice[slot] = nil
		} else {
			c.Slots++
		}
	})
	if err != nil || len(twice) == 0 {
		return err
	}
	c.Shared = int64(len(twice))
	err = walk(func(n namer, slot store.Slot) {
		if list, ok := twice[slot]; ok {
			twice[slot] = append(list, n)
		}
	})
	if err != nil {
		return err
	}
	slots := make([]store.Slot, 0, len(twice))
	for slot := range twice {
		slots = append(slots, slot)
	}
	slices.Sort(slots)
	for _, slot := range slots {
		what, err := p.checkShared(ctx, slot, twice[slot])
		if err != nil {
			return err
		}
		if what != "" {
			n := twice[slot][0]
			problem(Problem{n.o.id, n.page * n.o.pageSize, what})
		}
	}
	return nil
}

// checkShared says what is wrong with a slot that seemed to be named more than once: "" if nothing is, any more. A slot that went from one page to another in between
// is not named by both.
func (p *Pager) checkShared(ctx context.Context, slot store.Slot, names []namer) (what string, err error) {
	for range checkSame {
		var now []namer
		for range 2 { // all of them, and all of them still: so at one instant
			now = now[:0]
			for _, n := range names {
				if n.still() {
					now = append(now, n)
				}
			}
		}
		what = ""
		if len(now) > 1 {
			for _, n := range now[1:] {
				if n.page != now[0].page || n.slot != now[0].slot || n.o.unit != now[0].o.unit {
					what = fmt.Sprintf("slot %d is used twice: also for object %d, offset %d", slot, n.o.id, n.page*n.o.pageSize)
				}
			}
			// Shares are counted by the page's first slot. More than here are those of snapshots that are being made or ended.
			if counted := p.shares.maps(now[0].slot); what == "" && counted < len(now) {
				what = fmt.Sprintf("slot %d is used by %d page maps, and counted for %d", slot, len(now), counted)
			}
		}
		if what == "" {
			return "", nil
		}
		if err := pause(ctx); err != nil {
			return "", err
		}
	}
	return what, nil
}

func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(checkPause):
		return nil
	}
}

// checkUsed holds the number of slots that maps name against the store's.
func (p *Pager) checkUsed(ctx context.Context, c *Checked, problem func(Problem)) error {
	last, same := int64(0), 0
	for range checkTries {
		used := p.store.Info().Used
		named, quiet := p.named()
		diff := used/store.SlotSize - named
		switch {
		case !quiet || used != p.store.Info().Used:
			same = 0
		case diff == 0:
			return nil
		case same > 0 && diff == last:
			same++
		default:
			last, same = diff, 1
		}
		if same == checkSame {
			if diff > 0 {
				problem(Problem{-1, -1, fmt.Sprintf("%d slots are in use in the store, and no page map names %d of them", used/store.SlotSize, diff)})
			} else {
				problem(Problem{-1, -1, fmt.Sprintf("page maps name %d slots, and %d of them are free in the store", named, -diff)})
			}
			return nil
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
	c.Uncounted++
	return nil
}

// named counts the slots that maps name, shared ones once. quiet: nothing that would take or give back slots was under way.
func (p *Pager) named() (n int64, quiet bool) {
	p.mu.Lock()
	ids := slices.Clone(p.ids)
	p.mu.Unlock()
	seen, quiet := slotSet{}, true
	for _, o := range ids {
		if o == nil {
			continue
		}
		o.mu.Lock()
		if o.gone || o.copying != nil || len(o.active)+len(o.waiting)+len(o.retired[0])+len(o.retired[1]) > 0 {
			quiet = false
		}
		for c := 0; !o.gone && c < len(o.counts); c++ {
			if o.counts[c] == 0 {
				continue
			}
			words := o.chunk(c)
			for i := range words {
				if w := words[i].Load(); w != 0 && !seen.add(wordSlot(w)) {
					n += int64(o.unit)
				}
			}
		}
		o.mu.Unlock()
	}
	return n, quiet
}
