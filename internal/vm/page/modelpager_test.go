package page

import "fmt"

// rules can be taken out one by one, to see that the checker finds what they prevent. The zero rules are the pager's.
type rules struct {
	noBusy         bool // grants do not own the page
	zeroAny        bool // contents other than zeros are filled Dirty first too
	plainCopy      bool // a write is filled by a COPY that gives write access, before the word says Dirty
	existIsDone    bool // EEXIST from COPY is taken for done
	adoptPresence  bool // adoption takes what was Requested and lies in the file for filled
	adoptClean     bool // adoption takes Cleaning for Clean
	adoptNoWake    bool // adoption wakes nobody
	noWake         bool // the end of a transitional state wakes nobody
	protectOne     bool // a cleaner protects only the first mapping
	readFirst      bool // a cleaner reads the contents before it protects
	punchUnstored  bool // a store that failed is taken for done
	lostDirtyAsked bool // EFAULT from CONTINUE asks the manager again, also for a page that was Dirty before
}

// config is what takes part.
type config struct {
	rules   rules
	crash   bool // the pager dies at any step, and another adopts
	signal  bool // blocked threads are interrupted, and repeat their access: duplicate messages, and stale ones
	zap     bool // the kernel takes entries away
	stray   bool // a rogue task puts zeros into the file where there is a hole (fallocate)
	remove  bool // a rogue task punches the page (MADV_REMOVE)
	discard bool // BeginDiscard and Claim
	ahead   bool // Prefetch and Around
	second  bool // a second reader for the first task: one handles a message while another holds an answer
	limit   int  // states; 0: no bound
}

// The workers of the pager: two fault readers, one of each task, a cleaner, an evictor, and a second reader of task 0.
const (
	reader0 = iota
	reader1
	cleaning
	evicting
	reader2
	workers
)

var workerNames = [workers]string{"reader 0", "reader 1", "cleaner", "evictor", "reader 0'"}

func mapping(id int) int { return [workers]int{reader1: 1}[id] }

// worker is one goroutine of the pager: where it is, and its local variables. They are gone when the pager dies.
type worker struct {
	pc    pc
	then  pc     // after the wakes
	msg   access // what it answers
	buf   value  // contents on their way
	fresh bool   // it took the page from Clean or Requested itself: the manager's copy is good
}

type pc uint8

const (
	idle pc = iota

	// A reader with a message decides by the word.
	decide
	// It owns Requested.
	ask
	copyFill
	overwrite
	continueRequested
	supplyAfterWake
	supply
	supplyUnmapped
	abandon
	zeroFirst
	// It owns Busy.
	zeroCopy
	zeroOverwrite
	continueWP
	continueWrite
	fillZeros
	unprotect
	grantAfterWake
	granted
	lost
	// The cleaner owns Cleaning.
	protect0
	protect1
	readBack
	put
	stored
	notStored
	// The cleaner or evictor owns Evicting.
	punch
	punched
	// Nothing is owned, wakes are owed.
	wake0
	wake1
	wakeSelf
	numPCs
)

// forget drops local variables that are not read again, so that states which differ in nothing else are one.
func (w *worker) forget() {
	switch w.pc {
	case idle:
		*w = worker{}
	case copyFill, overwrite, zeroFirst, zeroCopy, zeroOverwrite, put, protect0, protect1: // contents on their way; the protections only if they come too late
		return
	case continueWP, continueWrite:
		w.buf = hole
	case supplyAfterWake, granted, lost, grantAfterWake, stored, notStored, punch, punched, wakeSelf:
		keep := w.msg
		if w.pc != supplyAfterWake {
			keep = none
		}
		*w = worker{pc: w.pc, msg: keep}
	case wake0, wake1:
		if w.then == idle || w.then == wakeSelf {
			w.msg = none
		}
		w.buf, w.fresh = hole, false
	default:
		*w = worker{pc: w.pc, msg: w.msg}
	}
}

// stage of an adoption.
type stage uint8

const (
	serving stage = iota
	adoptPunch
	adoptWord
	adoptWake0
	adoptWake1
)

// step is one move of somebody. must: it happens if nothing else does. bad: what is wrong with it.
type step struct {
	to             state
	who, what, bad string
	must           bool
}

// model makes steps. It is scratch space: not for concurrent use.
type model struct {
	config
	steps []step
}

func (m *model) add(s state, who, what string, must bool) *step {
	m.steps = append(m.steps, step{to: s, who: who, what: what, must: must})
	return &m.steps[len(m.steps)-1]
}

// next is Next, without Busy if that rule is out.
func (m *model) next(w Word, e Event) (Word, Effect) {
	if !m.rules.noBusy {
		return Next(w, e)
	}
	switch e {
	case Granted:
		return w, Done
	case Lost:
		if s := w.State(); s != Clean && s != Dirty {
			return w, Done
		}
		return Next(w|BusyBit, Lost)
	}
	n, eff := Next(w, e)
	if n.Busy() && n.Waiters() { // nobody will end it
		n, eff = n&^WaitersBit, eff|Wake
	}
	return n &^ BusyBit, eff
}

// adopt is Adopt, with the rules that are out.
func (m *model) adopt(s *state) (Word, Remains) {
	w := Word(s.word)
	switch {
	case m.rules.adoptPresence && w.State() == Requested && s.file != hole:
		return w.in(Dirty) &^ WaitersBit, KeepFrame
	case m.rules.adoptClean && w.State() == Cleaning:
		return w.in(Clean) &^ WaitersBit, KeepFrame
	}
	return Adopt(w)
}

// all returns every step from s. The slice is good until the next call.
func (m *model) all(s *state) []step {
	m.steps = m.steps[:0]
	for t := range tasks {
		m.task(s, t)
	}
	m.world(s)
	if s.adopting != serving {
		m.adoption(s)
		return m.steps
	}
	for id := range workers {
		if s.workers[id].pc != idle {
			m.work(s, id)
		} else {
			m.begin(s, id)
		}
	}
	return m.steps
}

var taskNames = [tasks]string{"thread 0", "thread 1"}

func (m *model) task(s *state, t int) {
	try := func(want access, must bool) {
		n := *s
		what, bad := n.touch(t, want)
		m.add(n, taskNames[t], what, must).bad = bad
	}
	switch th := s.threads[t]; th.phase {
	case running:
		try(read, false)
		try(write, false)
	case again:
		try(th.want, true)
	default:
		if m.signal {
			n := *s
			n.wake(t)
			m.add(n, taskNames[t], "is interrupted by a signal", false)
		}
	}
}

// world is what neither tasks nor pager decide.
func (m *model) world(s *state) {
	if m.crash && s.adopting != adoptPunch {
		n := *s
		n.workers = [workers]worker{}
		n.adopting = adoptPunch
		m.add(n, "pager", "dies", false)
	}
	if m.stray && s.file == hole {
		n := *s
		n.file = zero
		m.add(n, "rogue", "puts zeros into the hole", false)
	}
	if m.remove && s.file != hole {
		n := *s
		n.discarding = false // it is the rogue's punch, not the evictor's
		n.punch()
		n.discarding, n.removed = s.discarding, true
		m.add(n, "rogue", "punches the page", false)
	}
	for t := range tasks {
		if m.zap && s.ptes[t] >= protected {
			n := *s
			n.zap(t)
			m.add(n, "kernel", "takes an entry away", false)
		}
	}
}

func (m *model) adoption(s *state) {
	n := *s
	w, r := m.adopt(&n)
	switch s.adopting {
	case adoptPunch: // before the word: who dies in between is adopted the same way
		n.adopting = adoptWord
		if r == PunchFrame {
			n.punch()
			m.add(n, "new pager", "punches what nobody owns now", true)
			return
		}
		m.add(n, "new pager", "leaves the frame", true)
	case adoptWord:
		n.word, n.adopting = uint8(w), adoptWake0
		if m.rules.adoptNoWake {
			n.adopting = serving
		}
		m.add(n, "new pager", "adopts the word", true)
	case adoptWake0:
		n.wake(0)
		n.adopting = adoptWake1
		m.add(n, "new pager", "wakes mapping 0", true)
	case adoptWake1:
		n.wake(1)
		n.adopting = serving
		m.add(n, "new pager", "wakes mapping 1", true)
	}
}

// begin is what an idle worker can begin.
func (m *model) begin(s *state, id int) {
	switch id {
	case reader0, reader1, reader2:
		if id == reader2 && !m.second {
			return
		}
		if t := s.threads[mapping(id)]; t.phase == unread {
			n := *s
			n.threads[mapping(id)].phase = blocked
			n.workers[id] = worker{pc: decide, msg: t.want}
			m.add(n, workerNames[id], "reads the message", true)
		}
		if m.ahead && id != reader2 {
			for _, a := range []access{prefetch, around} {
				if _, eff := m.next(Word(s.word), a.event()); eff != Refused {
					m.decide(s, id, worker{msg: a}, false)
				}
			}
		}
	case cleaning:
		m.take(s, id, BeginClean, worker{pc: protect0})
	case evicting:
		m.take(s, id, BeginEvict, worker{pc: punch})
		if m.discard {
			m.take(s, id, BeginDiscard, worker{pc: punch})
			m.take(s, id, Claim, worker{pc: punch})
		}
	}
}

func (m *model) take(s *state, id int, e Event, w worker) {
	n := *s
	next, eff := m.next(Word(s.word), e)
	if eff == Refused {
		return
	}
	if m.rules.readFirst && w.pc == protect0 {
		w.pc = readBack
	}
	n.word, n.workers[id], n.discarding = uint8(next), w, e == BeginDiscard
	m.add(n, workerNames[id], e.String(), false)
}

// bug is a transition that was refused to an owner.
func bug(w uint8, e Event) string { return fmt.Sprintf("BUG: %v refused on %v", e, Word(w)) }
