package pager

import (
	"fmt"
	"sync"
	"sync/atomic"

	"machpager/pager/emm"
	"machpager/pager/store"
)

// maxObject is the largest size of an object in bytes.
const maxObject = 1 << 50

// A word of the page map is 0, or the first slot above the state.
const (
	wordStored = 1
	wordShift  = 8
)

func storedWord(s store.Slot) uint64 { return uint64(s)<<wordShift | wordStored }
func wordSlot(w uint64) store.Slot   { return store.Slot(w >> wordShift) }

// chunkPages is how many pages of the map are counted together. Where nothing is stored the map is not even looked at.
const chunkPages = 512

// object is a memory object that the default pager manages.
//
// Readers of slots enter an epoch, which is 0 or 1, and leave it. Slots that are replaced are retired in the current epoch. When nobody is left in
// the other one, what was retired there is freed and it becomes the current one: whoever enters from then on sees the new map.
type object struct {
	p         *Pager
	entry     entry        // immutable; as the table has it
	id        int          // immutable; place in the table
	port      emm.Port     // immutable
	pageSize  int64        // immutable; bytes
	unit      int          // immutable; slots per page
	size      int64        // immutable; bytes, whole pages
	temporary bool         // immutable; taken over with Create, ends with Terminate
	adopted   bool         // immutable; an earlier pager made it
	mem       store.Memory // the page map; grown under mu
	shared    atomic.Bool  // set with mu, for ever: some of its slots may be another's too

	account atomic.Pointer[Account] // set once, with mu or before anybody knows the object; nil: none

	snapshots sync.Mutex // held while a snapshot is made: one after the other

	mu       sync.Mutex
	words    []atomic.Uint64 // guarded by mu; the page map, as far as it reaches
	counts   []int32         // guarded by mu; stored pages by chunk, as far as words
	stored   int64           // guarded by mu; stored pages
	att      *attachment     // guarded by mu; nil if no vm has it
	doomed   bool            // guarded by mu; ends at Terminate, or is ending: nobody attaches any more
	gone     bool            // guarded by mu; the table knows it no more, and what is in progress is the last
	released bool            // guarded by mu; release was started
	epoch    int             // guarded by mu; 0 or 1
	readers  [2]int          // guarded by mu
	retired  [2][]slotRun    // guarded by mu; no map names them, a reader may still read them
	active   []*write        // guarded by mu; in progress
	waiting  []waiter        // guarded by mu; in order of arrival
	copying  *copying        // guarded by mu; the snapshot that is being made, or nil
}

// attachment is a vm's use of an object, from Init or Create to Terminate: the cookie of its control.
type attachment struct {
	o       *object
	control emm.Control
	dead    atomic.Bool // set with object.mu; terminated: nothing is answered any more
}

type slotRun struct {
	slot store.Slot
	n    int
}

// appendSlots adds a run, to the last one if it continues it.
func appendSlots(runs []slotRun, s store.Slot, n int) []slotRun {
	if k := len(runs) - 1; k >= 0 && runs[k].slot+store.Slot(runs[k].n) == s {
		runs[k].n += n
		return runs
	}
	return append(runs, slotRun{s, n})
}

func newObject(p *Pager, id int, e entry, mem store.Memory) *object {
	o := &object{p: p, entry: e, id: id, port: e.port, pageSize: e.pageSize, unit: int(e.pageSize / store.SlotSize), temporary: e.temporary, mem: mem}
	o.size = (e.size + e.pageSize - 1) &^ (e.pageSize - 1)
	if e.temporary {
		o.size = maxObject // what Create says is a hint
	}
	o.words = mem.Words()
	o.counts = make([]int32, (len(o.words)+chunkPages-1)/chunkPages)
	return o
}

// sparse is implemented by memory that knows where it may hold anything but zeros.
type sparse interface {
	Data(fn func(off, n int64) bool)
}

// recount counts the stored pages of a map that was found. Where the memory can tell, only what was ever touched is looked at. From New.
func (o *object) recount() {
	count := func(off, n int64) bool {
		for i := off / 8; i < (off+n)/8; i++ {
			if o.words[i].Load() != 0 {
				o.counts[i/chunkPages]++
				o.stored++
			}
		}
		return true
	}
	if m, ok := o.mem.(sparse); ok {
		m.Data(count)
	} else {
		count(0, int64(len(o.words))*8)
	}
}

// word is the map's word for a page. Called with mu.
func (o *object) word(page int64) uint64 {
	if page >= int64(len(o.words)) || o.counts[page/chunkPages] == 0 {
		return 0
	}
	return o.words[page].Load()
}

// reach makes the map reach to pages. Called with mu.
func (o *object) reach(pages int64) error {
	if pages <= int64(len(o.words)) {
		return nil
	}
	// By doubling, in whole chunks: untouched pages of the map cost nothing.
	n := max(pages, min(2*int64(len(o.words)), o.size/o.pageSize))
	n = (n + chunkPages - 1) / chunkPages * chunkPages
	if err := o.mem.Grow(n * 8); err != nil {
		return fmt.Errorf("grow page map of object %d to %d pages: %w: %w", o.id, n, emm.ResourceShortage, err)
	}
	o.words = o.mem.Words()
	o.counts = append(o.counts, make([]int32, (len(o.words)+chunkPages-1)/chunkPages-len(o.counts))...)
	return nil
}

// commit stores one word of the map, and retires what the old one named. Called with mu.
func (o *object) commit(page int64, w uint64) {
	old := o.word(page)
	if old == w {
		return
	}
	if o.copying != nil {
		o.save(int(page / chunkPages))
	}
	o.words[page].Store(w)
	switch {
	case old == 0:
		o.counts[page/chunkPages]++
		o.stored++
		o.account.Load().add(o.p, int64(o.unit))
	case w == 0:
		o.counts[page/chunkPages]--
		o.stored--
		o.account.Load().add(o.p, -int64(o.unit))
	}
	if old != 0 {
		o.retired[o.epoch] = appendSlots(o.retired[o.epoch], wordSlot(old), o.unit)
	}
}

// enter makes the caller a reader of the slots that the map names now. Called with mu.
func (o *object) enter() (epoch int) {
	o.readers[o.epoch]++
	return o.epoch
}

// reap takes the retired slots that no reader can be reading. Called with mu; the caller frees them without it.
func (o *object) reap(runs []slotRun) []slotRun {
	for range 2 {
		other := 1 - o.epoch
		if len(o.retired[0])+len(o.retired[1]) == 0 || o.readers[other] > 0 {
			break
		}
		runs = append(runs, o.retired[other]...)
		o.retired[other] = o.retired[other][:0]
		o.epoch = other
	}
	return runs
}

// leave ends what enter began.
func (o *object) leave(epoch int) {
	o.mu.Lock()
	o.readers[epoch]--
	runs := o.reap(nil)
	release := o.releasable()
	o.mu.Unlock()
	o.free(runs)
	if release {
		go o.release()
	}
}

// free frees slots that a map of this object named, or would have: those that nobody shares.
func (o *object) free(runs []slotRun) {
	var last [8]slotRun
	if o.shared.Load() {
		runs = o.p.shares.drop(last[:0], runs, o.unit)
	}
	for _, r := range runs {
		o.p.store.Free(r.slot, r.n)
	}
}

// detach ends the attachment: requests that wait are dropped. Called with mu.
func (o *object) detach() {
	if o.att == nil {
		return
	}
	o.att.dead.Store(true)
	o.att = nil
	keep := o.waiting[:0]
	for _, m := range o.waiting {
		if m.w != nil {
			keep = append(keep, m)
		}
	}
	clear(o.waiting[len(keep):])
	o.waiting = keep
}

// releasable reports, once, that nothing of a gone object is in progress. Called with mu; who gets true calls release.
func (o *object) releasable() bool {
	if !o.gone || o.released || o.readers[0]+o.readers[1]+len(o.active)+len(o.waiting) > 0 {
		return false
	}
	o.released = true
	return true
}

// release frees all slots and the map of a gone object. It takes its time: not on a fault reader.
func (o *object) release() {
	o.p.step("pager.release")
	o.mu.Lock()
	runs := o.reap(nil)
	o.account.Load().add(o.p, -o.stored*int64(o.unit))
	o.mu.Unlock()
	o.free(runs)
	o.slots(func(s store.Slot, n int) bool {
		o.free([]slotRun{{s, n}})
		return true
	})
	if err := o.mem.Close(); err != nil {
		o.p.log.Error("close page map", "object", o.id, "err", err)
	}
	o.p.step("pager.released")
	o.p.mu.Lock()
	o.p.table.clear(o.id)
	o.p.ids[o.id] = nil
	o.p.quiet.Broadcast()
	o.p.mu.Unlock()
}

// whole reports whether r is a run of whole pages.
func (o *object) whole(r emm.Run) bool {
	return r.Off >= 0 && r.Size > 0 && r.Off <= maxObject && r.Size <= maxObject && (r.Off|r.Size)&(o.pageSize-1) == 0
}
