package pager

import (
	"fmt"

	"machpager/internal/failpoint"
	"machpager/pager/emm"
)

// Snapshot makes an object that port copy names, as ObjectCreate does, with the contents that the object source has in paging space at this instant. What
// is in progress then, and what the vm has not returned, is not in it. Either may be written afterwards: contents go to new slots, as always, and
// slots that both name are freed with the last that does.
//
// No contents move: it takes time and memory in proportion to the stored pages, 8 bytes of the page map and 4 of share counts for each. Messages about either object
// go on meanwhile; snapshots of one object are made one after the other. It waits for no I/O, but it is not for a fault reader. A pager
// killed in the middle has made no copy.
//
// Errors: InvalidArgument (source is none of the default pager's objects, or copy is taken), InvalidObject (source has ended), ResourceShortage.
func (p *Pager) Snapshot(source, copy emm.Port) error {
	if err := p.snapshot(source, copy); err != nil {
		return fmt.Errorf("make snapshot of object: %w", err)
	}
	return nil
}

func (p *Pager) snapshot(source, port emm.Port) error {
	o := p.lookup(source)
	if o == nil {
		return emm.InvalidArgument
	}
	o.snapshots.Lock()
	defer o.snapshots.Unlock()
	o.mu.Lock()
	if o.gone {
		o.mu.Unlock()
		return emm.InvalidObject
	}
	epoch := o.enter() // what is read is the map: it is not released
	o.mu.Unlock()
	defer o.leave(epoch)

	p.mu.Lock()
	c, err := p.reserve(entry{port: port, size: o.size, pageSize: o.pageSize})
	p.mu.Unlock()
	if err != nil {
		return err
	}
	p.step("snapshot.reserved")
	if err = o.copyTo(c); err == nil && !p.account(port).room(p, c.stored*int64(c.unit)) {
		err = errQuota
	}
	if err == nil {
		p.step("snapshot.copied")
		p.mu.Lock()
		err = p.publish(c)
		p.mu.Unlock()
	}
	if err != nil {
		c.mu.Lock()
		c.gone, c.released = true, true // nobody else has it
		c.mu.Unlock()
		c.release()
		return err
	}
	p.step("snapshot.published")
	return nil
}

// copying is a snapshot that is being made.
type copying struct {
	to    *object
	saved []bool // by chunk of the source, as far as it reached at the instant of the snapshot
}

// copyBatch is how many chunks are copied before others get the lock.
const copyBatch = 8

// copyTo copies the map to c, as it is at one instant: a chunk that changes before its turn is copied before it does.
func (o *object) copyTo(c *object) error {
	o.mu.Lock()
	for len(c.words) < len(o.words) {
		pages := int64(len(o.words))
		o.mu.Unlock()
		c.mu.Lock()
		err := c.reach(pages)
		c.mu.Unlock()
		if err != nil {
			return err
		}
		o.mu.Lock()
	}
	c.shared.Store(true)
	o.shared.Store(true)
	s := &copying{to: c, saved: make([]bool, len(o.counts))}
	o.copying = s // the instant
	for chunk := range s.saved {
		if chunk%copyBatch == 0 {
			o.mu.Unlock()
			o.p.step("snapshot.batch")
			o.mu.Lock()
		}
		o.save(chunk)
	}
	o.copying = nil
	o.mu.Unlock()
	return nil
}

// save copies a chunk of the map to the snapshot that is being made, once. Called with mu; it takes that of the snapshot, which nobody has but who looks
// at all objects, one at a time.
func (o *object) save(chunk int) {
	s := o.copying
	if chunk >= len(s.saved) || s.saved[chunk] {
		return
	}
	s.saved[chunk] = true
	if o.counts[chunk] == 0 {
		return
	}
	s.to.mu.Lock()
	defer s.to.mu.Unlock()
	from, to := o.chunk(chunk), s.to.chunk(chunk)
	o.p.shares.add(from)
	for i := range from {
		if w := from[i].Load(); w != 0 {
			to[i].Store(w)
		}
	}
	s.to.counts[chunk] = o.counts[chunk]
	s.to.stored += int64(o.counts[chunk])
}

// step is an instant after which a crash must lose nothing: a failpoint, of which a test in this process is told too.
func (p *Pager) step(name string) {
	failpoint.Here(name)
	if p.hook != nil {
		p.hook(name)
	}
}
