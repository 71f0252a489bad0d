package vm

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"machpager/internal/failpoint"
	"machpager/internal/frames"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// Adoption: a pager that was killed at any instruction leaves page tables, files of frames and registered mappings; the one after it makes objects and mappings of them
// again and goes on. It begins when the old pager is certainly gone, with a vm that was made with Options.Adopting:
//
//	AdoptObject   for each object: every word of its table by the rules of page.Adopt, its frames counted, its manager told (Init)
//	NewTask       for each task: it has no reader yet
//	AdoptMapping  for each mapping, where the task has it; AdoptWire for what it has wired
//	Resume        readers begin, every range is woken once; then the policy is told what is resident (introduce)
//
// Until Resume nothing is cleaned, evicted, discarded or paged out: a page must be protected in every mapping before its contents are read, and until then not
// all of them are known.

// AdoptOptions describe an object of an earlier vm to AdoptObject.
type AdoptOptions struct {
	ObjectOptions // as NewObject had them then
	ID            uint64
	// Length is Object.Size as it was last, in bytes: Size, or what SetSize had made of it.
	Length int64
	// Created says that the default manager has the object, whose Manager is nil: it has heard of the Port by Create.
	Created bool
	Table   Table        // the object's from here on
	File    *frames.File // the object's from here on; see frames.Pool.AdoptFile
}

// Adopted is what was found of an object.
type Adopted struct {
	Resident int64 // pages
	Dirty    int64 // of these; the manager's copies are stale, or it has none
	Errors   int64 // pages that it could not supply
	Punched  int64 // pages that were on their way in or out: they are absent now
	Stuck    int64 // frames in the file that nobody accounts for and that would not go
}

// AdoptObject makes an object of an earlier vm known to this one: its page table and what is resident of it. Nobody maps it yet. Its frames are taken whatever
// the budget says. A manager that has lost it, or refuses it, destroys it: then every touch is an error. Only before Resume. On an error Table and File stay
// the caller's.
func (v *VM) AdoptObject(opt AdoptOptions) (*Object, Adopted, error) {
	fail := func(err error) (*Object, Adopted, error) {
		return nil, Adopted{}, fmt.Errorf("adopt object %d: %w", opt.ID, err)
	}
	if !v.adopting.Load() || opt.ID == 0 || opt.Table == nil || opt.File == nil {
		return fail(fmt.Errorf("want a vm that adopts, a number, a table and a file: %w", emm.InvalidArgument))
	}
	o, err := v.object(opt.ObjectOptions)
	if err != nil {
		return fail(err)
	}
	if words := opt.Table.Words(); int64(len(words)) < o.size>>o.shift || opt.Length < 0 || opt.Length > o.size || opt.File.Size() < o.size {
		return fail(fmt.Errorf("a table of %d pages, a file of %d bytes and a length of %d for an object of %d bytes: %w", len(words), opt.File.Size(), opt.Length, o.size,
			emm.InvalidArgument))
	}
	o.id, o.table, o.file = opt.ID, opt.Table, opt.File
	o.words = o.table.Words()[:o.size>>o.shift]
	o.limit.Store((opt.Length + o.pageSize - 1) >> o.shift)
	v.mu.Lock()
	if v.objects[o.id] != nil {
		v.mu.Unlock()
		return fail(fmt.Errorf("there is one of this number: %w", emm.InvalidArgument))
	}
	v.objects[o.id] = o
	v.mu.Unlock()
	v.used(o.id)
	a, err := o.adopt()
	if err != nil {
		v.mu.Lock()
		delete(v.objects, o.id)
		v.mu.Unlock()
		v.frames.Release(int(o.resident.Load()))
		o.account.add(-o.resident.Load())
		return fail(err)
	}
	failpoint.Here("adopt.table")
	v.guaranteed.add(o.room.min) // it was granted then
	switch def := v.defaultManager(); {
	case opt.Manager != nil:
		o.bind(opt.Manager, opt.Port)
	case opt.Created && def == nil:
		v.log.Error("adopt object: there is no default manager", "object", o.id)
		o.control.Destroy(emm.MemoryFailure)
	case opt.Created:
		o.bind(def, opt.Port).def = def
	}
	if err := o.attach(); err != nil {
		v.log.Error("adopt object: its contents are lost", "object", o.id, "err", err)
		o.control.Destroy(emm.MemoryFailure)
	}
	return o, a, nil
}

// attach tells the manager that has the object already, also a temporary one: Init.
func (o *Object) attach() error {
	b := o.binding.Load()
	if b == nil {
		return nil
	}
	o.initOnce.Do(func() { o.init(b) })
	return o.initErr
}

// adopt goes over the table, as far as anything was ever written to it. A frame is punched before its word says Absent, so that a pager that dies here is adopted
// in the same way.
func (o *Object) adopt() (a Adopted, err error) {
	v, n := o.vm, o.npages()
	walk := touched{o: o}
	for p := walk.next(0, n); p < n; p = walk.next(p, n) {
		w := o.word(p)
		if w == 0 {
			p++
			continue
		}
		if w.State() >= page.NumStates {
			return a, fmt.Errorf("page %d is %#x in its table, which is no state: %w", p, uint64(w), emm.InvalidArgument)
		}
		now, remains := page.Adopt(w)
		end := p + 1
		if remains == page.PunchFrame {
			for end < n && end-p < o.extentPages() && punched(o.word(end)) {
				end++
			}
			left, err := o.file.Punch(p<<o.shift, (end-p)<<o.shift)
			if err != nil {
				return a, fmt.Errorf("pages %d to %d: %w", p, end-1, err)
			}
			failpoint.Here("adopt.punched")
			for q := p; q < end; q++ {
				o.adoptWord(q)
			}
			if left > 0 {
				a.Stuck += o.keepStuck(p, end)
			}
			a.Punched += end - p
			p = end
			continue
		}
		if !now.Resident() {
			o.adoptWord(p)
			if now.State() == page.Error {
				a.Errors++
				if now&page.Failure == 0 && len(o.broken) < healMax {
					o.broken = append(o.broken, p)
				}
			}
			p++
			continue
		}
		end = p
		for same := w; end < n; end++ { // most words are as the one before
			was := o.word(end)
			if was != same {
				now, remains = page.Adopt(was)
				if same = was; remains == page.PunchFrame || !now.Resident() {
					break
				}
			}
			if now != was {
				o.words[end].Store(uint64(now))
			}
			if now.State() == page.Dirty {
				a.Dirty++
			}
		}
		o.charge(p, end)
		a.Resident += end - p
		p = end
	}
	if in, err := o.file.Blocks(); err != nil {
		return a, err
	} else if in/frameSize > o.resident.Load() {
		stuck := o.clear()
		a.Stuck += stuck
		v.log.Info("adopt object: frames that nobody accounts for", "object", o.id, "bytes", in-o.resident.Load()*frameSize, "stuck", stuck*frameSize)
	}
	return a, nil
}

// punched reports whether adoption punches the frame of w.
func punched(w page.Word) bool {
	_, remains := page.Adopt(w)
	return remains == page.PunchFrame
}

// adoptWord makes the word of p what a new pager begins with.
func (o *Object) adoptWord(p int64) {
	w := o.word(p)
	if now, _ := page.Adopt(w); now != w {
		o.words[p].Store(uint64(now))
	}
}

// charge counts the frames of the resident pages [a, b). The policy is told of them later: see introduce.
func (o *Object) charge(a, b int64) {
	f := int64(o.framesOf(b - a))
	o.counted(f)
	o.vm.frames.Claim(f)
	o.strange = append(o.strange, pageRun{a, b})
}

// keepStuck counts what would not go of the pages [a, b).
func (o *Object) keepStuck(a, b int64) int64 {
	f := o.strand(a, b)
	o.counted(f)
	o.vm.frames.Claim(f)
	return f
}

// clear punches what lies in the file under Absent pages and behind its end, and counts what will not go. It returns those frames.
func (o *Object) clear() (stuck int64) {
	o.file.Trim()
	o.file.Present(0, o.size, func(off, n int64) bool {
		for p, b := off>>o.shift, (off+n+o.pageSize-1)>>o.shift; p < b; {
			end := p
			for end < b && end-p < o.extentPages() && !o.word(end).Resident() {
				end++
			}
			if end == p {
				p++
				continue
			}
			if left, err := o.file.Punch(p<<o.shift, (end-p)<<o.shift); err == nil && left > 0 {
				stuck += o.keepStuck(p, end)
			}
			p = end
		}
		return true
	})
	return stuck
}

// Span is a piece of a mapping: there is one, unless the task moved parts of it with mremap(2).
type Span struct {
	Addr      uint64 // in the task
	Off, Size int64  // bytes, of the object
}

// Spans are the pieces of the mapping, where the task has them now; none: it was not started, or all of it was unmapped.
func (m *Mapping) Spans() []Span { return exported(*m.spans.Load()) }

func exported(s []span) []Span {
	out := make([]Span, len(s))
	for i, p := range s {
		out[i] = Span{p.addr, p.off, p.n}
	}
	return out
}

// AdoptMapping makes a mapping of an earlier vm known to this one: the task has it, registered, at spans, or, if there are none, was about to map it and will
// Start it. Nothing of the task's is touched, and no fault is answered before Resume. off and size are Mapping.Offset and Size. Only before Resume.
func (t *Task) AdoptMapping(o *Object, id uint64, off, size int64, readOnly bool, spans []Span) (*Mapping, error) {
	fail := func(err error) (*Mapping, error) { return nil, fmt.Errorf("adopt mapping %d: %w", id, err) }
	if !t.vm.adopting.Load() || id == 0 || size <= 0 || (off|size)&(o.pageSize-1) != 0 {
		return fail(fmt.Errorf("offset %d, size %d: want a vm that adopts, a number and whole pages: %w", off, size, emm.InvalidArgument))
	}
	if _, _, err := o.pages(off, size); err != nil {
		return fail(err)
	}
	s := make([]span, len(spans))
	for i, p := range spans {
		if p.Addr == 0 || p.Size <= 0 || (p.Addr|uint64(p.Off)|uint64(p.Size))&(frameSize-1) != 0 || p.Addr+uint64(p.Size) < p.Addr || p.Off < off || p.Off > off+size-p.Size {
			return fail(fmt.Errorf("bytes %d to %d of the object at %#x: %w", p.Off, p.Off+p.Size, p.Addr, emm.InvalidAddress))
		}
		s[i] = span{p.Addr, p.Off, p.Size}
	}
	if !t.gate.enter() {
		return fail(emm.InvalidTask)
	}
	defer t.gate.leave()
	if !o.gate.enter() {
		return fail(emm.InvalidObject)
	}
	defer o.gate.leave()
	t.vm.used(id)
	m := newMapping(t, o, id, off, size, readOnly)
	m.spans.Store(&s)
	o.addMapping(m)
	t.addMapping(m)
	if err := t.mapped(m); err != nil {
		m.Close()
		return fail(err)
	}
	failpoint.Here("adopt.mapping")
	return m, nil
}

// AdoptWire counts the bytes [off, off+n) of the mapping, from its beginning, as wired once more: an earlier vm had answered Wire. They are resident, and stay so
// whatever the budget says now. A Wire that was not answered is asked for again. Only before Resume.
func (m *Mapping) AdoptWire(off, n int64) error {
	o := m.obj
	a, b, err := m.wireRange("adopt wiring", off, n)
	if err != nil {
		return err
	}
	if !o.vm.adopting.Load() {
		return fmt.Errorf("adopt wiring: too late: %w", emm.InvalidArgument)
	}
	f, first := int64(o.framesOf(1)), m.off>>o.shift
	m.wires.mu.Lock()
	defer m.wires.mu.Unlock()
	if m.wires.count == nil {
		m.wires.count = map[int64]uint16{}
	}
	for p := a; p < b; p++ {
		now, _, eff := o.step(p, page.Wire)
		if eff == page.Refused {
			return fmt.Errorf("adopt wiring: page %d is wired too often: %w", p, emm.ResourceShortage)
		}
		if m.wires.count[p-first]++; m.wires.count[p-first] == 1 {
			m.task.wired.Add(f)
		}
		if now.Wired() == 1 {
			o.chargeWired(f)
		}
	}
	return nil
}

// used makes the numbers of what comes later go on behind id.
func (v *VM) used(id uint64) {
	for {
		last := v.nextID.Load()
		if last >= id || v.nextID.CompareAndSwap(last, id) {
			return
		}
	}
}

// Resume ends adoption: from now on faults are answered, pages go out, and nothing more can be adopted. Messages that the earlier pager had read are lost with it, so
// every range of every mapping is woken once; ranges that have vanished meanwhile are met as always. What could not be supplied is asked for again, with
// back-off. In a vm that does not adopt, or not any more, it does nothing.
func (v *VM) Resume() {
	began := time.Now()
	v.mu.Lock()
	if !v.adopting.CompareAndSwap(true, false) {
		v.mu.Unlock()
		return
	}
	tasks, objects := slices.Collect(maps.Values(v.tasks)), slices.Collect(maps.Values(v.objects))
	v.mu.Unlock()
	strays, err := v.frames.Recount()
	if err != nil {
		v.log.Error("resume: frames of files that nobody knows cannot be counted", "err", err)
	}
	failpoint.Here("adopt.resume")
	close(v.resumed)
	v.begin()
	for _, t := range tasks {
		t.begin()
	}
	mappings := 0
	for _, t := range tasks {
		t.mu.Lock()
		maps := slices.Clone(t.maps)
		t.mu.Unlock()
		for _, m := range maps {
			if m.gate.enter() {
				m.wake(m.pages())
				m.gate.leave()
				mappings++
			}
		}
	}
	resident := int64(0)
	for _, o := range objects {
		for _, p := range o.broken {
			v.healLater(o, p)
		}
		o.broken = nil
		resident += o.resident.Load()
	}
	v.bg.Go(func() { v.introduce(objects) })
	v.log.Info("resumed", "objects", len(objects), "tasks", len(tasks), "mappings", mappings, "resident", resident*frameSize, "strays", strays, "took", time.Since(began))
}

const (
	// introduceAtOnce is how many units the policy is told of in one call: its mutex is held for some of those, and who waits for it answers a fault.
	introduceAtOnce = 64
	// introduceCalls is after how many calls introduce rests for introducePause, unless frames are wanted: the threads that have waited for this pager want a processor.
	introduceCalls = 64
	introducePause = 100 * time.Microsecond
)

// introduce tells the policy what is resident of adopted objects. That takes some 0.1 us for each page, for which no thread in a fault must wait; so it is done beside all else, and what
// the policy has not heard of is no victim for that long. A page may come, go and come again meanwhile, and the policy hear of it in the wrong order. It is made for that: a page that
// it has heard of twice is taken for new, and one that is gone is refused when it is named as a victim, and is then forgotten (Object.keep).
func (v *VM) introduce(objects []*Object) {
	calls := 0
	for _, o := range objects {
		for _, r := range o.strange {
			for p := r.a; p < r.b && v.ctx.Err() == nil && o.gate.enter(); {
				p = o.introduce(p, r.b)
				o.gate.leave()
				if calls++; calls%introduceCalls == 0 && !v.starving.Load() && v.wanted.Load() == 0 {
					time.Sleep(introducePause)
				}
			}
		}
		o.strange = nil
	}
	v.kickNow() // more than the budget may be resident
}

// introduce tells of the first of the resident pages [a, b), and returns the first that it has not told of. How they came is not known: whole extents are taken for one unit each.
func (o *Object) introduce(a, b int64) int64 {
	unit, ext := int64(o.framesOf(1)), o.extentPages()
	end := min(b, a+introduceAtOnce)
	switch first := (a + ext - 1) / ext * ext; {
	case !o.vm.frames.Extents() || first+ext > b: // none begins here
	case first == a:
		unit, end = extentSize/frameSize, a+ext
	default:
		end = min(end, first)
	}
	o.vm.policy.Fill(o.frameRun(a, end), unit, -1)
	return end
}
