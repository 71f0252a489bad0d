package page

import "fmt"

// The model: one page of an object, two tasks that map it, the pager, and the kernel between them. A state is a value; a step is a function from state
// to states. Messages, decisions, ioctls and changes of the word are separate steps, and every order of them is explored (modelsearch_test.go).
//
// The page holds one register. Its contents are abstract: the pager moves bytes and never looks at them, so all that matters of a value is whether it is
// what was last written. A write makes what it hits cur and everything else that was cur old. So tasks can read and write without end, and the
// state space is finite all the same.

type value uint8

const (
	hole value = iota // no page in the file
	cur               // what was last written
	old               // what was once written
	zero              // zeros that nobody wrote
)

// pte is the entry of the page in one mapping.
type pte uint8

const (
	empty     pte = iota
	marker        // no entry, but a uffd-wp marker: what protection leaves where nothing is mapped, and zapping where it was protected
	protected     // mapped, uffd-wp
	writable
)

// access is what a thread wants, and what a message says. MISSING and MINOR are alike to the pager, so the model keeps only the trace of it.
type access uint8

const (
	none      access = iota
	read             // no entry, wants to read
	write            // no entry, wants to write
	writeProt        // uffd-wp entry, wants to write
	prefetch         // no message: the pager asks by itself
	around           // no message: the pager maps a neighbour
)

// event is the fault event for a.
func (a access) event() Event {
	return [...]Event{read: FaultRead, write: FaultWrite, writeProt: FaultWP, prefetch: Prefetch, around: Around}[a]
}

func (a access) String() string {
	return [...]string{"none", "read", "write", "write-protect", "prefetch", "around"}[a]
}

type phase uint8

const (
	running phase = iota
	again         // runs, and is about to repeat the access that faulted
	unread        // blocked; its message has not been read
	blocked       // blocked; its message has been read
)

// thread is the one thread of a task.
type thread struct {
	phase phase
	want  access // unless running
}

const tasks = 2

// state is a state of the model. It is comparable and has no padding.
type state struct {
	word       uint8 // the low bits of a Word: the wired count stays 0
	file       value
	store      value // what the manager has
	ptes       [tasks]pte
	threads    [tasks]thread
	workers    [workers]worker
	adopting   stage // of a pager that begins; 0: it serves
	removed    bool  // a task punched the page since the last write: until the next one, zeros are as right as cur
	discarding bool  // what is Evicting is thrown away, not stored: the manager's contents count from the punch on
}

// wrote makes *v what was last written.
func (s *state) wrote(v *value) {
	age := func(x *value) {
		if *x == cur {
			*x = old
		}
	}
	age(&s.file)
	age(&s.store)
	for i := range s.workers {
		age(&s.workers[i].buf)
	}
	*v = cur
	s.removed = false
}

// touch is one attempt of thread t: it reads or writes, or faults and blocks. bad says what it saw that it must not see.
func (s *state) touch(t int, want access) (what, bad string) {
	th := &s.threads[t]
	switch p := s.ptes[t]; {
	case want == read && p >= protected:
		*th = thread{}
		switch {
		case s.file == hole:
			return "reads", "BUG in the model: an entry without a page"
		case s.file == old:
			return "reads old contents", "a read sees stale contents: a write is lost"
		case s.file == zero && !s.removed:
			return "reads zeros", "a read sees zeros in place of data"
		}
		return "reads", ""
	case want == write && p == writable:
		*th = thread{}
		s.wrote(&s.file)
		return "writes", ""
	case p == protected:
		*th = thread{unread, writeProt}
		return "faults: write-protect", ""
	}
	*th = thread{unread, want}
	return [2][2]string{{"faults: missing, read", "faults: missing, write"}, {"faults: minor, read", "faults: minor, write"}}[min(s.file, 1)][want-read], ""
}

// wake ends the wait of the task's thread, which repeats its access. A message that was not read goes with it.
func (s *state) wake(m int) {
	th := &s.threads[m]
	if th.phase < unread {
		return
	}
	th.phase = again
	if th.want == writeProt {
		th.want = write
	}
}

// errno is the outcome of an ioctl.
type errno uint8

const (
	ok     errno = iota
	exist        // EEXIST
	efault       // EFAULT
)

func (e errno) String() string { return [...]string{"", ": EEXIST", ": EFAULT"}[e] }

// mode of an ioctl that maps the page.
type mode struct{ wp, dontWake bool }

func (md mode) entry() pte {
	if md.wp {
		return protected
	}
	return writable
}

// copyIn is UFFDIO_COPY of v in mapping m.
func (s *state) copyIn(m int, v value, md mode) errno {
	if s.file != hole {
		return exist
	}
	s.file, s.ptes[m] = v, md.entry()
	if !md.dontWake {
		s.wake(m)
	}
	return ok
}

// continueIn is UFFDIO_CONTINUE in mapping m. It overwrites a marker.
func (s *state) continueIn(m int, md mode) errno {
	switch {
	case s.file == hole:
		return efault
	case s.ptes[m] >= protected:
		return exist
	}
	s.ptes[m] = md.entry()
	s.wake(m)
	return ok
}

// protect is UFFDIO_WRITEPROTECT with MODE_WP; it leaves a marker where nothing is mapped.
func (s *state) protect(m int) {
	switch s.ptes[m] {
	case empty:
		s.ptes[m] = marker
	case writable:
		s.ptes[m] = protected
	}
}

// unprotect is UFFDIO_WRITEPROTECT without MODE_WP. It wakes.
func (s *state) unprotect(m int) {
	switch s.ptes[m] {
	case marker:
		s.ptes[m] = empty
	case protected:
		s.ptes[m] = writable
	}
	s.wake(m)
}

// zap takes the entry of m away, as reclaim and khugepaged do. It wakes nobody.
func (s *state) zap(m int) {
	switch s.ptes[m] {
	case protected:
		s.ptes[m] = marker
	case writable:
		s.ptes[m] = empty
	}
}

// punch is PUNCH_HOLE of the page.
func (s *state) punch() {
	s.file = hole
	for m := range s.ptes {
		s.zap(m)
	}
	if s.discarding { // from now on the manager's contents are the contents
		s.wrote(&s.store)
		s.discarding = false
	}
}

func (v value) String() string { return [...]string{"hole", "cur", "old", "zero"}[v] }

func (p pte) String() string { return [...]string{"empty", "marker", "protected", "writable"}[p] }

func (s *state) String() string {
	return fmt.Sprintf("%-18v file %-4v store %-3v entries %v %v", Word(s.word), s.file, s.store, s.ptes[0], s.ptes[1])
}
