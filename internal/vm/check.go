package vm

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"machpager/internal/vm/page"
)

// Problem is a broken invariant.
type Problem struct {
	Object uint64 // 0: of no object
	Off    int64  // bytes; where in the object, -1: nowhere in particular
	What   string
}

// Checked is what Check has looked at.
type Checked struct {
	Objects   int   `json:"objects"`
	Pages     int64 `json:"pages"`           // whose words were ever written to
	Resident  int64 `json:"resident_pages"`  // held against the files
	Empty     int64 `json:"empty_pages"`     // dirty pages without a frame: they read as zeros, which is right if they were never written, or a task threw them away
	Unsettled int64 `json:"unsettled_pages"` // somebody owned them whenever they were looked at
	Uncounted int   `json:"uncounted"`       // counts that changed whenever they were taken
}

// Check holds the page tables against the files and the counts of frames, while all goes on. Pages that look wrong from outside are looked at once more by their
// owner: Check takes them as a fault reader or an evictor would, and gives them back as they were. So what it reports was wrong at that instant. problem is called
// for each, on the caller's goroutine. It reads no contents, and asks managers for nothing. ctx ends it early.
func (v *VM) Check(ctx context.Context, problem func(Problem)) (Checked, error) {
	var c Checked
	objects := v.allObjects()
	slices.SortFunc(objects, func(a, b *Object) int { return cmp.Compare(a.id, b.id) })
	for _, o := range objects {
		if !o.gate.enter() {
			continue
		}
		err := o.check(ctx, &c, problem)
		o.gate.leave()
		if err != nil {
			return c, fmt.Errorf("check object %d: %w", o.id, err)
		}
	}
	if err := v.checkFrames(ctx, &c, problem); err != nil {
		return c, fmt.Errorf("check frames: %w", err)
	}
	return c, nil
}

// run is a range of pages.
type pageRun struct{ a, b int64 }

// present is which pages have frames in the file, whole (all) or in part.
func (o *Object) present() (all, part []pageRun, err error) {
	add := func(list *[]pageRun, a, b int64) {
		if n := len(*list); n > 0 && (*list)[n-1].b >= a {
			(*list)[n-1].b = max((*list)[n-1].b, b)
			return
		}
		*list = append(*list, pageRun{a, b})
	}
	err = o.file.Present(0, o.size, func(off, n int64) bool {
		add(&part, off>>o.shift, (off+n+o.pageSize-1)>>o.shift)
		if a, b := (off+o.pageSize-1)>>o.shift, (off+n)>>o.shift; a < b {
			add(&all, a, b)
		}
		return true
	})
	return all, part, err
}

// seek is the first run that ends behind page p, from i on.
func seek(runs []pageRun, i int, p int64) int {
	for i < len(runs) && runs[i].b <= p {
		i++
	}
	return i
}

// check checks one object, whose gate the caller has entered.
func (o *Object) check(ctx context.Context, c *Checked, problem func(Problem)) error {
	c.Objects++
	all, part, err := o.present()
	if err != nil {
		return err
	}
	n := o.npages()
	// Pages that should have their frames.
	walk, i := touched{o: o}, 0
	for p := walk.next(0, n); p < n; p = walk.next(p+1, n) {
		if c.Pages++; c.Pages%4096 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if s := o.word(p).State(); s != page.Clean && s != page.Dirty {
			continue
		}
		c.Resident++
		if i = seek(all, i, p); i == len(all) || all[i].a > p {
			if err := o.checkThere(ctx, p, c, problem); err != nil {
				return err
			}
		}
	}
	// Frames that should not be there.
	strays, first := int64(0), int64(-1)
	for _, r := range part {
		for p := r.a; p < r.b; p++ {
			if o.word(p).Resident() {
				continue
			}
			f, err := o.checkGone(ctx, p, c)
			if err != nil {
				return err
			}
			if strays += f; f > 0 && first < 0 {
				first = p << o.shift
			}
		}
	}
	if stuck := o.stuck.Load(); strays > stuck {
		problem(Problem{o.id, first, fmt.Sprintf("%d frames lie in its file under pages that are absent, and %d are accounted for (a task put them there; they are taken back when frames "+
			"are short)", strays, stuck)})
	}
	return o.checkCounts(ctx, c, problem)
}

// How often and how long Check looks again at what is in motion.
const (
	checkTries = 50
	checkPause = time.Millisecond
	checkSame  = 5 // a count is wrong when it was by the same amount so often in a row
)

// again waits a moment before the next look.
func (c *Checked) again(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(checkPause):
		return nil
	}
}

// checkThere looks at a page that is Clean or Dirty and seems to lack frames, as its owner.
func (o *Object) checkThere(ctx context.Context, p int64, c *Checked, problem func(Problem)) error {
	for range checkTries {
		_, before, eff := o.step(p, page.Around)
		if eff == page.ContinueWP {
			got, err := o.file.Occupied(p<<o.shift, o.pageSize)
			o.end(p, page.Granted)
			switch {
			case err != nil:
				return err
			case got == o.pageSize:
			case before.State() == page.Clean:
				problem(Problem{o.id, p << o.shift, fmt.Sprintf("the page is %v, but of its %d bytes %d are in the file (a task that may write has punched them out)", before, o.pageSize, got)})
			default:
				c.Empty++
			}
			return nil
		}
		if !before.Transitional() { // gone meanwhile
			return nil
		}
		if err := c.again(ctx); err != nil {
			return err
		}
	}
	c.Unsettled++
	return nil
}

// checkGone looks at a page that is Absent or in Error and seems to have frames, as its owner if it is Absent. It returns how many there are.
func (o *Object) checkGone(ctx context.Context, p int64, c *Checked) (int64, error) {
	for range checkTries {
		_, before, eff := o.step(p, page.Claim)
		if eff == page.Refused && before.State() != page.Error {
			if !before.Transitional() {
				return 0, nil // filled meanwhile
			}
			if err := c.again(ctx); err != nil {
				return 0, err
			}
			continue
		}
		got, err := o.file.Occupied(p<<o.shift, o.pageSize)
		if eff != page.Refused {
			o.end(p, page.Punched)
		} else if o.word(p) != before {
			continue
		}
		return got / frameSize, err
	}
	c.Unsettled++
	return 0, nil
}

// checkCounts holds the frames and wired frames that are counted for an object against its words.
func (o *Object) checkCounts(ctx context.Context, c *Checked, problem func(Problem)) error {
	unit := int64(o.framesOf(1))
	return c.stable(ctx, func() (counted, found [2]int64, quiet bool) {
		counted = [2]int64{o.resident.Load(), o.room.wired.Load()}
		found[0], quiet = o.stuck.Load(), true
		walk, n := touched{o: o}, o.npages()
		for p := walk.next(0, n); p < n; p = walk.next(p+1, n) {
			w := o.word(p)
			quiet = quiet && !w.Transitional()
			if w.Resident() {
				found[0] += unit
			}
			if w.Wired() > 0 {
				found[1] += unit
			}
		}
		return counted, found, quiet && counted == [2]int64{o.resident.Load(), o.room.wired.Load()}
	}, func(counted, found [2]int64) {
		if counted[0] != found[0] {
			problem(Problem{o.id, -1, fmt.Sprintf("%d frames are reserved for it, and its page table accounts for %d", counted[0], found[0])})
		}
		if counted[1] != found[1] {
			problem(Problem{o.id, -1, fmt.Sprintf("%d frames are counted as wired, and its page table has %d", counted[1], found[1])})
		}
	})
}

// checkFrames holds the pool's count against the objects', and the kernel's against the pool's.
func (v *VM) checkFrames(ctx context.Context, c *Checked, problem func(Problem)) error {
	err := c.stable(ctx, func() (counted, found [2]int64, quiet bool) {
		counted[0] = v.frames.Reserved()
		for _, o := range v.allObjects() {
			found[0] += o.resident.Load()
		}
		return counted, found, counted[0] == v.frames.Reserved()
	}, func(counted, found [2]int64) {
		problem(Problem{0, -1, fmt.Sprintf("%d frames are reserved, and the objects together have %d", counted[0], found[0])})
	})
	if err != nil {
		return err
	}
	most := int64(-1) // the least excess of all looks: what comes and goes does not count
	for range checkSame {
		used, err := v.frames.Usage()
		if err != nil {
			return err
		}
		excess := used/frameSize - v.frames.Reserved()
		if excess <= 0 {
			return nil
		}
		if most < 0 || excess < most {
			most = excess
		}
		if err := c.again(ctx); err != nil {
			return err
		}
	}
	problem(Problem{0, -1, fmt.Sprintf("the kernel counts %d frames more than are reserved (tasks have put them into the files, or keep files of objects that have ended)", most)})
	return nil
}

// stable calls take until what is counted is what is found, and wrong if it was found to differ by the same amounts several times in a row, in quiet moments. What never
// keeps quiet is not compared.
func (c *Checked) stable(ctx context.Context, take func() (counted, found [2]int64, quiet bool), wrong func(counted, found [2]int64)) error {
	var last [2][2]int64
	same := 0
	for range checkTries {
		counted, found, quiet := take()
		switch now := [2][2]int64{counted, found}; {
		case !quiet:
			same = 0
		case counted == found:
			return nil
		case same > 0 && now == last:
			same++
		default:
			same, last = 1, now
		}
		if same == checkSame {
			wrong(counted, found)
			return nil
		}
		if err := c.again(ctx); err != nil {
			return err
		}
	}
	c.Uncounted++
	return nil
}
