// Package page is the life of one page: a 64-bit word and its transitions, pure. next(word, event) gives a word and what its maker owes.
//
// The table of words is the truth of the vm; a fault message is only a hint that somebody should look. A word says who may touch the
// page's frame:
//
//	Absent     not ours in the file. What the page contains is the manager's to say.
//	Requested  a data_request is out, exactly one. Its owner (who made the transition, then who holds the answer) alone fills.
//	           No mapping can write the page.
//	Clean      in the file; no mapping has a writable entry; the manager could supply the same bytes (unless Precious).
//	Dirty      in the file, may be writable in any mapping. The manager's copy is stale.
//	Cleaning   write-protected in every mapping (or about to be, by the owner), a data_return is under way.
//	Evicting   about to be punched out of the file by the owner; its contents are stored, or wanted by nobody.
//	Error      the manager answered data_error; threads get SIGBUS or EFAULT until it is asked again.
//
// Busy stands beside Clean or Dirty: a grant (CONTINUE or un-protect in one mapping) is under way. Every ioctl that gives access runs only
// while its issuer owns the page: Requested, or Clean or Dirty with Busy. Without Busy a reader's grant lands after an evictor's protection, and
// a page called Clean is writable: the next eviction throws its writes away.
//
// Requested, Cleaning, Evicting and Busy are transitional: who finds one sets Waiters and drops its fault; who ends it owes a wake in every
// mapping if Waiters was set. The thread then faults again and the table answers, so a dropped fault is never lost.
//
// Transitions, by whom (R a fault reader or who populates, A who answers a request, C a cleaner or evictor, S a new pager that adopts):
//
//	Absent    -> Requested (R) | Evicting (C, a frame that nobody put there)
//	Requested -> Clean (A, read) | Dirty+Busy (A, write) | Absent (A, no frame or mapping gone) | Error (A)
//	Clean     -> Clean+Busy, Dirty+Busy (R)  | Evicting (C) | Cleaning (C, if Precious)
//	Dirty     -> Dirty+Busy (R) | Cleaning (C) | Evicting (C, discard)
//	+Busy     -> without (its owner) | Absent (its owner, if the frame is gone and the manager has the bytes)
//	Cleaning  -> Clean | Evicting | Dirty, if not stored (C)
//	Evicting  -> Absent (C)
//	Error     -> Requested (R, unless it is for ever)
package page

import "strings"

// Word is the state of one page. The zero Word is Absent. Bits 8 to 15 and 32 to 63 are not this package's: every transition keeps them.
type Word uint64

// State is the low three bits of a Word.
type State uint8

// The states. See the package comment.
const (
	Absent State = iota
	Requested
	Clean
	Dirty
	Cleaning
	Evicting
	Error
	// NumStates counts them.
	NumStates
)

const (
	stateMask  Word = 7
	BusyBit    Word = 1 << 3 // a grant is under way; only beside Clean and Dirty
	WaitersBit Word = 1 << 4 // somebody dropped a fault on this page; volatile
	Precious   Word = 1 << 5 // the manager keeps no copy: return the page even if it is clean
	Failure    Word = 1 << 6 // beside Error: for ever (MemoryFailure)

	wiredShift      = 16
	wiredOne   Word = 1 << wiredShift
	wiredMask  Word = 0xffff << wiredShift
	// MaxWired is the largest wired count of one page.
	MaxWired = 0xffff
)

// State is the page's state.
func (w Word) State() State { return State(w & stateMask) }

// Busy reports whether a grant is under way.
func (w Word) Busy() bool { return w&BusyBit != 0 }

// Waiters reports whether a fault on the page was dropped.
func (w Word) Waiters() bool { return w&WaitersBit != 0 }

// Wired is the wired count.
func (w Word) Wired() int { return int(w & wiredMask >> wiredShift) }

// Resident reports whether the word accounts for a frame, filled or about to be.
func (w Word) Resident() bool {
	switch w.State() {
	case Requested, Clean, Dirty, Cleaning, Evicting:
		return true
	}
	return false
}

// Transitional reports whether somebody owns the page at this moment.
func (w Word) Transitional() bool {
	switch w.State() {
	case Requested, Cleaning, Evicting:
		return true
	}
	return w.Busy()
}

var stateNames = [8]string{"Absent", "Requested", "Clean", "Dirty", "Cleaning", "Evicting", "Error", "invalid"}

func (s State) String() string { return stateNames[s&7] }

func (w Word) String() string {
	s := []string{w.State().String()}
	for _, b := range []struct {
		bit  Word
		name string
	}{{BusyBit, "Busy"}, {WaitersBit, "Waiters"}, {Precious, "Precious"}, {Failure, "Failure"}, {wiredMask, "Wired"}} {
		if w&b.bit != 0 {
			s = append(s, b.name)
		}
	}
	return strings.Join(s, "+")
}

func (w Word) in(s State) Word { return w&^stateMask | Word(s) }

// Event is what happens to a page.
type Event uint8

// The events.
const (
	// A fault was met or is to be spared. MISSING and MINOR messages are alike: only the word tells which it is.
	FaultRead  Event = iota // no entry, wants to read
	FaultWrite              // no entry, wants to write
	FaultWP                 // write-protected entry
	Prefetch                // nobody waits: ask if Absent, otherwise leave alone
	Around                  // map a resident neighbour: grant without access to write, otherwise leave alone

	// The owner of Requested answers.
	SupplyRead   // filled and write-protected
	SupplyWrite  // filled and write-protected, about to be un-protected
	Abandon      // not filled
	Fail         // data_error, may pass
	FailForever  // data_error for ever
	SupplyPrec   // as SupplyRead, and the manager keeps no copy
	SupplyPrecWr // as SupplyWrite, and the manager keeps no copy

	// The owner of Busy is done.
	Granted // the grant has landed, or its mapping is gone
	Lost    // CONTINUE found no frame in the file, and the page was Clean when the owner took it: the manager has the bytes

	// Cleaners and evictors.
	BeginClean   // Dirty, or Clean and Precious: return the page
	BeginReturn  // Clean or Dirty: return the page even if the manager has a copy
	BeginEvict   // Clean: let go of it
	BeginDiscard // Clean or Dirty: throw it away
	Claim        // Absent: punch what lies in the file though nobody put it there
	Stored       // Cleaning: ReturnCompleted(Success), keep
	StoredEvict  // Cleaning: ReturnCompleted(Success), go on to Evicting; a wired page is kept
	NotStored    // Cleaning: anything else
	Punched      // Evicting: the frame is gone

	Wire   // one more reason to keep the page
	Unwire // one less

	// NumEvents counts them.
	NumEvents
)

var eventNames = [NumEvents]string{"FaultRead", "FaultWrite", "FaultWP", "Prefetch", "Around", "SupplyRead", "SupplyWrite", "Abandon", "Fail", "FailForever", "SupplyPrec", "SupplyPrecWr", "Granted", "Lost",
	"BeginClean", "BeginReturn", "BeginEvict", "BeginDiscard", "Claim", "Stored", "StoredEvict", "NotStored", "Punched", "Wire", "Unwire"}

func (e Event) String() string {
	if e < NumEvents {
		return eventNames[e]
	}
	return "invalid"
}

// Effect is what whoever made the transition has to do.
type Effect uint8

// The effects. Only Wake goes with others: it comes from the end of a transitional state.
const (
	// Refused: the event does not apply and the word is unchanged. For the events of faults and the Begin events this is an ordinary
	// answer ("not now"); for the owner's events it is a broken invariant.
	Refused Effect = 0
	// Done: the transition is made, nothing else is owed.
	Done Effect = 1 << (iota - 1)
	// Wake: wake every mapping of the page.
	Wake
	// Wait: the page is somebody's; drop the fault, a wake will come.
	Wait
	// Request: the caller owns Requested; reserve a frame, ask the manager.
	Request
	// ContinueWP: the caller owns Busy; map without write access, then Granted.
	ContinueWP
	// ContinueWrite: the caller owns Busy and the page is Dirty; map with write access, then Granted.
	ContinueWrite
	// Unprotect: the caller owns Busy and the page is Dirty; un-protect, then Granted.
	Unprotect
	// Poison: the page is lost for ever; poison it in the mapping.
	Poison
)

// end leaves a transitional state for s, and tells who must be woken.
func (w Word) end(s State) (Word, Effect) {
	n := w.in(s) &^ (BusyBit | WaitersBit)
	if w.Waiters() {
		return n, Done | Wake
	}
	return n, Done
}

// Next is the transition table. It returns the next word and what is owed; Refused with the word unchanged if e does not apply.
func Next(w Word, e Event) (Word, Effect) {
	switch e {
	case FaultRead, FaultWrite, FaultWP:
		return w.fault(e)
	case Prefetch:
		if w.State() == Absent {
			return w.in(Requested), Request
		}
	case Around:
		if s := w.State(); (s == Clean || s == Dirty) && !w.Busy() {
			return w | BusyBit, ContinueWP
		}
	case SupplyRead, SupplyWrite, SupplyPrec, SupplyPrecWr, Abandon, Fail, FailForever:
		if w.State() == Requested {
			return w.answered(e)
		}
	case Granted:
		if w.Busy() {
			return w.end(w.State())
		}
	case Lost:
		if w.Busy() {
			n, eff := w.end(Absent)
			return n &^ Precious, eff
		}
	case BeginClean, BeginReturn, BeginEvict, BeginDiscard, Claim:
		return w.begin(e)
	case Stored, StoredEvict, NotStored, Punched:
		return w.cleaned(e)
	case Wire:
		if w.Wired() < MaxWired {
			return w + wiredOne, Done
		}
	case Unwire:
		if w.Wired() > 0 {
			return w - wiredOne, Done
		}
	}
	return w, Refused
}

func (w Word) fault(e Event) (Word, Effect) {
	if w.Transitional() {
		return w | WaitersBit, Wait
	}
	switch w.State() {
	case Absent:
		return w.in(Requested), Request
	case Error:
		if w&Failure != 0 {
			return w, Poison
		}
		return w.in(Requested), Request
	case Clean:
		if e == FaultRead {
			return w | BusyBit, ContinueWP
		}
		w = w.in(Dirty)
	case Dirty:
	default: // no state at all
		return w, Refused
	}
	if e == FaultWP {
		return w | BusyBit, Unprotect
	}
	return w | BusyBit, ContinueWrite
}

func (w Word) answered(e Event) (Word, Effect) {
	switch e {
	case SupplyRead:
		return w.end(Clean)
	case SupplyPrec:
		n, eff := w.end(Clean)
		return n | Precious, eff
	case SupplyWrite:
		return w.in(Dirty) | BusyBit, Done
	case SupplyPrecWr:
		return w.in(Dirty) | BusyBit | Precious, Done
	case Abandon:
		return w.end(Absent)
	case Fail:
		return w.end(Error)
	default: // FailForever
		n, eff := w.end(Error)
		return n | Failure, eff
	}
}

func (w Word) begin(e Event) (Word, Effect) {
	if w.Transitional() {
		return w, Refused
	}
	s := w.State()
	switch {
	case e == BeginClean && (s == Dirty || s == Clean && w&Precious != 0):
		return w.in(Cleaning), Done
	case e == BeginReturn && (s == Dirty || s == Clean):
		return w.in(Cleaning), Done
	case e == BeginEvict && s == Clean && w&Precious == 0 && w.Wired() == 0:
		return w.in(Evicting), Done
	case e == BeginDiscard && (s == Clean || s == Dirty) && w.Wired() == 0:
		return w.in(Evicting) &^ Precious, Done
	case e == Claim && s == Absent:
		return w.in(Evicting), Done
	}
	return w, Refused
}

func (w Word) cleaned(e Event) (Word, Effect) {
	s := w.State()
	switch {
	case e == Stored && s == Cleaning, e == StoredEvict && s == Cleaning && w.Wired() > 0:
		n, eff := w.end(Clean)
		return n &^ Precious, eff
	case e == StoredEvict && s == Cleaning:
		return w.in(Evicting) &^ Precious, Done
	case e == NotStored && s == Cleaning:
		return w.end(Dirty)
	case e == Punched && s == Evicting:
		return w.end(Absent)
	}
	return w, Refused
}

// Remains is what adoption does with the frame of a page whose old pager died.
type Remains uint8

const (
	KeepFrame  Remains = iota // as it is: present and accounted for, or absent
	PunchFrame                // punch it out of the file: nobody could have written it, or it is stored
)

// Adopt is the word that a new pager begins with, when the old one is certainly gone: who owned the page died at any instruction. Nobody has it wired: who had says so
// again.
func Adopt(w Word) (Word, Remains) {
	n := w &^ (BusyBit | WaitersBit | wiredMask)
	switch w.State() {
	case Requested: // no mapping had a writable entry, and what lies in the file may be half a page
		return n.in(Absent) &^ Precious, PunchFrame
	case Cleaning: // not punched yet: the contents are there, the store may lack them
		return n.in(Dirty), KeepFrame
	case Evicting: // stored, or to be thrown away
		return n.in(Absent) &^ Precious, PunchFrame
	}
	return n, KeepFrame
}
