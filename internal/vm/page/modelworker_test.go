package page

// decide is the reader's look at the word: what Next says is done, and nothing else is looked at.
func (m *model) decide(s *state, id int, w worker, must bool) {
	n := *s
	next, eff := m.next(Word(s.word), w.msg.event())
	n.word = uint8(next)
	what := w.msg.event().String()
	w.fresh = Word(s.word).State() == Clean
	waiters := eff & Wake // only where the rule of Busy is out
	switch eff &^ Wake {
	case Wait:
		n.workers[id] = worker{}
		m.add(n, workerNames[id], what+": somebody's, drops it", must)
		return
	case Request:
		w.pc, w.fresh = ask, false
		what += ": data request"
	case ContinueWP:
		w.pc = continueWP
		what += ": grants a read"
	case ContinueWrite:
		w.pc = continueWrite
		what += ": grants a write"
	case Unprotect:
		w.pc = unprotect
		what += ": un-protects"
	default:
		m.add(n, workerNames[id], what, must).bad = bug(s.word, w.msg.event())
		return
	}
	if waiters != 0 {
		for t := range tasks {
			n.wake(t)
		}
	}
	n.workers[id] = w
	m.add(n, workerNames[id], what, must)
}

// turn makes an owner's transition of the word; the wakes that it owes come before then.
func (m *model) turn(s *state, id int, e Event, then pc, what string) {
	n := *s
	next, eff := m.next(Word(s.word), e)
	w := &n.workers[id]
	n.word = uint8(next)
	switch {
	case then == idle && eff&Wake != 0 && !m.rules.noWake:
		*w = worker{pc: wake0}
	case then == idle:
		*w = worker{}
	case eff&Wake != 0 && !m.rules.noWake:
		w.pc, w.then = wake0, then
	default:
		w.pc = then
	}
	w.forget()
	st := m.add(n, workerNames[id], what, true)
	if eff == Refused {
		st.bad = bug(s.word, e)
	}
}

// work is the next step of a worker that has begun something: one ioctl, one read or write, or one change of the word.
func (m *model) work(s *state, id int) {
	n := *s
	w := &n.workers[id]
	me := mapping(id)
	to := func(p pc, what string) {
		w.pc = p
		w.forget()
		m.add(n, workerNames[id], what, true)
	}
	forWrite := w.msg == write || w.msg == writeProt
	switch w.pc {
	case decide:
		m.decide(s, id, *w, true)

	case ask:
		w.buf = n.store
		if forWrite && (w.buf == zero || m.rules.zeroAny) {
			to(zeroFirst, "asks the manager, which has nothing")
		} else {
			to(copyFill, "asks the manager")
		}
		n = *s
		to(abandon, "finds no frame")
	case copyFill:
		md := mode{wp: true, dontWake: forWrite}
		if m.rules.plainCopy && forWrite {
			md = mode{}
		}
		e := n.copyIn(me, w.buf, md)
		switch {
		case e == exist && m.rules.existIsDone:
			to(supplyAfterWake, "COPY: EEXIST, takes it for done")
		case e == exist:
			to(overwrite, "COPY: EEXIST")
		case md == mode{}:
			to(supply, "COPY, writable")
		case forWrite:
			to(supply, "COPY, write-protected, no wake")
		default:
			to(supply, "COPY, write-protected")
		}
	case zeroFirst: // the word first: who dies now leaves a Dirty page that is not there, which is zeros, as it should be
		m.turn(s, id, SupplyWrite, zeroCopy, "SupplyWrite")
	case zeroCopy:
		if n.copyIn(me, w.buf, mode{}) == exist {
			to(zeroOverwrite, "COPY, writable: EEXIST")
		} else {
			to(granted, "COPY, writable")
		}
		n = *s
		to(lost, "finds no frame after all")
	case zeroOverwrite:
		n.file = w.buf
		w.fresh = true
		to(continueWrite, "pwrite")
	case overwrite:
		n.file = w.buf
		if forWrite {
			to(supplyUnmapped, "pwrite")
		} else {
			to(continueRequested, "pwrite")
		}
	case continueRequested:
		switch n.continueIn(me, mode{wp: true}) {
		case exist:
			to(supplyAfterWake, "CONTINUE, write-protected: EEXIST")
		case efault:
			to(abandon, "CONTINUE, write-protected: EFAULT")
		default:
			to(supply, "CONTINUE, write-protected")
		}
	case supplyAfterWake:
		n.wake(me)
		to(supply, "wakes its own mapping")
	case supply:
		switch {
		case !forWrite:
			m.turn(s, id, SupplyRead, idle, "SupplyRead")
		case m.rules.plainCopy:
			m.turn(s, id, SupplyWrite, granted, "SupplyWrite")
		default: // COPY left an entry
			m.turn(s, id, SupplyWrite, unprotect, "SupplyWrite")
		}
	case supplyUnmapped: // pwrite left none; nobody can write the page before this worker says so
		s := *s
		s.workers[id].fresh = true
		m.turn(&s, id, SupplyWrite, continueWrite, "SupplyWrite")
	case abandon: // the message is kept and handled again
		then := decide
		if w.msg == prefetch {
			then = idle
		}
		m.turn(s, id, Abandon, then, "Abandon")

	case continueWP:
		switch n.continueIn(me, mode{wp: true}) {
		case exist:
			to(grantAfterWake, "CONTINUE, write-protected: EEXIST")
		case efault:
			if w.fresh {
				to(lost, "CONTINUE, write-protected: EFAULT")
			} else {
				to(granted, "CONTINUE, write-protected: EFAULT, nobody waits")
			}
		default:
			to(granted, "CONTINUE, write-protected")
		}
	case continueWrite:
		switch n.continueIn(me, mode{}) {
		case exist:
			if forWrite {
				to(unprotect, "CONTINUE: EEXIST")
			} else {
				to(grantAfterWake, "CONTINUE: EEXIST")
			}
		case efault:
			if w.fresh || m.rules.lostDirtyAsked {
				to(lost, "CONTINUE: EFAULT")
			} else {
				to(fillZeros, "CONTINUE: EFAULT, was Dirty before")
			}
		default:
			to(granted, "CONTINUE")
		}
	case fillZeros:
		if n.copyIn(me, zero, mode{wp: true, dontWake: true}) == exist {
			to(continueWrite, "COPY of zeros: EEXIST")
		} else {
			to(unprotect, "COPY of zeros, write-protected, no wake")
		}
	case unprotect:
		n.unprotect(me)
		to(granted, "un-protects")
	case grantAfterWake:
		n.wake(me)
		to(granted, "wakes its own mapping")
	case granted:
		m.turn(s, id, Granted, idle, "Granted")
	case lost:
		m.turn(s, id, Lost, wakeSelf, "Lost")

	case protect0:
		n.protect(0)
		switch {
		case m.rules.protectOne:
			to(readBack, "protects mapping 0 only")
		default:
			to(protect1, "protects mapping 0")
		}
	case protect1:
		n.protect(1)
		if m.rules.readFirst {
			to(put, "protects mapping 1")
		} else {
			to(readBack, "protects mapping 1")
		}
	case readBack:
		if w.buf = n.file; w.buf == hole {
			w.buf = zero // pread of a hole
		}
		if m.rules.readFirst {
			to(protect0, "reads the contents")
		} else {
			to(put, "reads the contents")
		}
	case put:
		n.store = w.buf
		to(stored, "the store takes the contents")
		n = *s
		if m.rules.punchUnstored {
			to(stored, "the store fails, takes it for done")
		} else {
			to(notStored, "the store fails")
		}
	case stored:
		m.turn(s, id, Stored, idle, "Stored")
		m.turn(s, id, StoredEvict, punch, "StoredEvict")
	case notStored:
		m.turn(s, id, NotStored, idle, "NotStored")

	case punch:
		n.punch()
		to(punched, "punches")
	case punched:
		m.turn(s, id, Punched, idle, "Punched")

	case wake0:
		n.wake(0)
		to(wake1, "wakes mapping 0")
	case wake1:
		n.wake(1)
		to(w.then, "wakes mapping 1")
	case wakeSelf:
		n.wake(me)
		to(idle, "wakes its own mapping")
	}
}
