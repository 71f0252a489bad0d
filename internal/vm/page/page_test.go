package page

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden table in testdata")

// allWords is every combination of the eight values of the state bits and all flags, also those that never occur, with wired counts at both ends.
func allWords() []Word {
	var ws []Word
	for bits := Word(0); bits < 1<<7; bits++ {
		for _, n := range []Word{0, 1, MaxWired} {
			ws = append(ws, bits|n<<wiredShift)
		}
	}
	return ws
}

// reachableWords is the closure of the zero Word under Next and Adopt; wired counts other than 0, 1 and the largest are left out, and the largest is
// entered by a jump, for to count there takes too long.
func reachableWords() map[Word]bool {
	seen := map[Word]bool{0: true}
	for queue := []Word{0}; len(queue) > 0; queue = queue[1:] {
		w := queue[0]
		next := []Word{w | wiredMask}
		for e := Event(0); e < NumEvents; e++ {
			n, _ := Next(w, e)
			next = append(next, n)
		}
		n, _ := Adopt(w)
		for _, n := range append(next, n) {
			if c := n.Wired(); (c <= 1 || c == MaxWired) && !seen[n] {
				seen[n] = true
				queue = append(queue, n)
			}
		}
	}
	return seen
}

// group is a set of events with one kind of owner.
type group int

const (
	anybody group = iota // faults, Begin events, and the wired count
	answerer
	granter
	cleaner
	evictor
)

func owner(e Event) group {
	switch e {
	case SupplyRead, SupplyWrite, SupplyPrec, SupplyPrecWr, Abandon, Fail, FailForever:
		return answerer
	case Granted, Lost:
		return granter
	case Stored, StoredEvict, NotStored:
		return cleaner
	case Punched:
		return evictor
	}
	return anybody
}

// ownerOf is the kind of owner that a well-formed word has.
func ownerOf(w Word) group {
	switch {
	case w.State() == Requested:
		return answerer
	case w.State() == Cleaning:
		return cleaner
	case w.State() == Evicting:
		return evictor
	case w.Busy():
		return granter
	}
	return anybody
}

func wellFormed(w Word) error {
	s := w.State()
	switch {
	case s >= NumStates:
		return fmt.Errorf("no state")
	case w.Busy() && s != Clean && s != Dirty:
		return fmt.Errorf("Busy beside %v", s)
	case w.Waiters() && !w.Transitional():
		return fmt.Errorf("Waiters on a page that nobody owns: nobody will wake them")
	case w&Failure != 0 && s != Error:
		return fmt.Errorf("Failure beside %v", s)
	case w&Precious != 0 && s != Clean && s != Dirty && s != Cleaning:
		return fmt.Errorf("Precious beside %v", s)
	}
	return nil
}

// TestReachable: whatever happens to a page, its word stays well-formed.
func TestReachable(t *testing.T) {
	seen := reachableWords()
	for w := range seen {
		if err := wellFormed(w); err != nil {
			t.Errorf("%s: %v", name(w), err)
		}
	}
	// And all that is well-formed is reached: no rule of the table is dead.
	for _, w := range allWords() {
		if wellFormed(w) == nil && !seen[w] {
			t.Errorf("%s is never reached", name(w))
		}
	}
}

// TestProperties asserts what holds for every word and event, also for words that never occur.
func TestProperties(t *testing.T) {
	for _, w := range allWords() {
		for e := Event(0); e < NumEvents+2; e++ {
			n, eff := Next(w, e)
			check := func(ok bool, what string) {
				t.Helper()
				if !ok {
					t.Errorf("%s, %v -> %s, %v: %s", name(w), e, name(n), eff.names(), what)
				}
			}
			check(eff != Refused || n == w, "Refused must leave the word alone")
			check(e < NumEvents || eff == Refused, "no such event")
			check(w.Waiters() == n.Waiters() || (eff&Wake != 0) == w.Waiters(), "Waiters goes if and only if a wake is owed")
			check(eff&Wake == 0 || w.Waiters() && !n.Waiters(), "a wake for nobody")
			check(eff&Wait == 0 || eff == Wait && n == w|WaitersBit && w.Transitional(), "Wait only adds Waiters, and only to what somebody owns")
			check(n.Waiters() == w.Waiters() || n.Waiters() == (eff == Wait), "only Wait sets Waiters")
			check(eff&(eff-1) == 0 || eff == Done|Wake, "only Wake goes with another effect")
			check(e != FaultRead && e != FaultWrite && e != FaultWP || eff != Refused || w.State() >= NumStates, "a fault is always answered")

			// Access is given by an owner only, and access to write only after the word says Dirty.
			check(eff != Request || n.State() == Requested, "a request without Requested")
			check(eff != ContinueWP || n.Busy() && (n.State() == Clean || n.State() == Dirty), "a grant without Busy")
			check(eff != ContinueWrite && eff != Unprotect || n.Busy() && n.State() == Dirty, "write access before the word is Dirty and Busy")
			check(n.Busy() == w.Busy() || !n.Busy() || n.State() == Clean || n.State() == Dirty, "Busy only beside Clean and Dirty")

			// Nobody takes a page from its owner.
			check(w.Wired() == n.Wired() || e == Wire && n.Wired() == w.Wired()+1 || e == Unwire && n.Wired() == w.Wired()-1, "the wired count is Wire's and Unwire's")
			check(owner(e) == anybody || w.Transitional() || eff == Refused, "an owner's event on a page that nobody owns")
			if wellFormed(w) == nil {
				check(e == Wire || e == Unwire || !w.Transitional() || eff == Refused || eff == Wait || owner(e) != anybody, "taken from its owner")
				check(wellFormed(n) == nil, "ill-formed")
				check(owner(e) == anybody || (eff != Refused) == (owner(e) == ownerOf(w)), "accepted from exactly one kind of owner")
			}

			// What may be thrown away.
			if n.State() == Evicting && w.State() != Evicting {
				check(w.Wired() == 0 || e == Claim && w.State() == Absent, "a wired page is evicted")
				check(w.State() != Clean || w&Precious == 0 || e == BeginDiscard, "the only copy is evicted")
				check(w.State() != Dirty || e == BeginDiscard, "a dirty page is evicted without having been stored")
			}
			check(n.State() != Absent || w.State() == Absent || e == Abandon || e == Punched || e == Lost, "the page vanished")
			check(w&Failure == 0 || n&Failure != 0, "for ever is for ever")
		}
	}
}

// TestAdopt: a new pager owns nothing and wakes everybody, throws away only what no mapping could write, and can be killed and adopt again.
func TestAdopt(t *testing.T) {
	for _, w := range allWords() {
		n, r := Adopt(w)
		check := func(ok bool, what string) {
			t.Helper()
			if !ok {
				t.Errorf("Adopt(%s) = %s, %v: %s", name(w), name(n), r, what)
			}
		}
		check(!n.Transitional() && !n.Waiters(), "a word that its dead owner was to end")
		check(n.Wired() == 0, "wired, though nobody has said so to the new pager")
		check(wellFormed(w) != nil || wellFormed(n) == nil, "ill-formed")
		check((r == PunchFrame) == (w.State() == Requested || w.State() == Evicting), "punch what was Requested or Evicting, and only that")
		check(r != PunchFrame || n.State() == Absent, "punched and not Absent")
		check(w.State() != Dirty && w.State() != Cleaning || n.State() == Dirty && n&Precious == w&Precious, "unstored contents forgotten")
		n2, r2 := Adopt(n)
		check(n2 == n && r2 == KeepFrame, "adopting twice is not adopting once")
	}
}

// TestResident: adoption recounts frames by Resident, so it must say the same as the transitions that reserve and release.
func TestResident(t *testing.T) {
	for _, w := range allWords() {
		s := w.State()
		if want := s == Requested || s == Clean || s == Dirty || s == Cleaning || s == Evicting; w.Resident() != want {
			t.Errorf("%s: Resident %v", name(w), w.Resident())
		}
		if wellFormed(w) != nil {
			continue
		}
		for e := Event(0); e < NumEvents; e++ {
			n, eff := Next(w, e)
			gains, loses := n.Resident() && !w.Resident(), w.Resident() && !n.Resident()
			if gains != (eff == Request || e == Claim && eff == Done) {
				t.Errorf("%s, %v: a frame is reserved %v", name(w), e, gains)
			}
			if loses != ((e == Abandon || e == Fail || e == FailForever || e == Lost || e == Punched) && eff != Refused) {
				t.Errorf("%s, %v: a frame is released %v", name(w), e, loses)
			}
		}
	}
}

// TestForeignBits: bits that are not this package's change nothing and survive everything.
func TestForeignBits(t *testing.T) {
	const foreign = ^Word(0) &^ (1<<7 - 1) &^ wiredMask
	for _, w := range allWords() {
		for e := Event(0); e < NumEvents; e++ {
			n, eff := Next(w, e)
			if fn, feff := Next(w|foreign, e); fn != n|foreign || feff != eff {
				t.Errorf("%s, %v: %#x, %s with foreign bits, %#x, %s without", name(w), e, fn, feff.names(), n, eff.names())
			}
		}
		n, r := Adopt(w)
		if fn, fr := Adopt(w | foreign); fn != n|foreign || fr != r {
			t.Errorf("Adopt(%s): %#x with foreign bits, %#x without", name(w), fn, n)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	words := allWords()
	var sum Word
	if n := testing.AllocsPerRun(10, func() {
		for _, w := range words {
			for e := Event(0); e < NumEvents; e++ {
				n, _ := Next(w, e)
				sum += n
			}
			n, _ := Adopt(w)
			sum += n
		}
	}); n != 0 {
		t.Errorf("%v allocations in a pass over the table, want none", n)
	}
	_ = sum
}

func TestStrings(t *testing.T) {
	for e := Event(0); e < NumEvents; e++ {
		if e.String() == "" || e.String() == "invalid" {
			t.Errorf("event %d has no name", e)
		}
	}
	for _, c := range []struct {
		got fmt.Stringer
		say string
	}{
		{Word(0), "Absent"}, {Word(Dirty) | BusyBit | WaitersBit | Precious | wiredOne, "Dirty+Busy+Waiters+Precious+Wired"},
		{Word(Error) | Failure, "Error+Failure"}, {Word(7), "invalid"}, {NumEvents, "invalid"}, {Granted, "Granted"}, {NumEvents - 1, "Unwire"},
	} {
		if c.got.String() != c.say {
			t.Errorf("%q, want %q", c.got, c.say)
		}
	}
}

func (e Effect) names() string {
	if e == Refused {
		return "Refused"
	}
	var s []string
	for i, n := range []string{"Done", "Wake", "Wait", "Request", "ContinueWP", "ContinueWrite", "Unprotect", "Poison"} {
		if e&(1<<i) != 0 {
			s = append(s, n)
		}
	}
	return strings.Join(s, "+")
}

// name is the word with its wired count.
func name(w Word) string {
	if w.Wired() == 0 {
		return w.String()
	}
	return fmt.Sprintf("%v(%d)", w, w.Wired())
}

// TestGolden holds the whole table, for every word that occurs, against testdata/table.txt. Events that are Refused are named in one line.
// A diff in that file is a change of the life of a page: read it as such. `go test -update` rewrites it.
func TestGolden(t *testing.T) {
	seen := reachableWords()
	var b bytes.Buffer
	for s := State(0); s < NumStates; s++ {
		for _, w := range allWords() {
			if w.State() == s && seen[w] {
				tabulate(&b, w)
			}
		}
	}
	file := filepath.Join("testdata", "table.txt")
	if *update {
		if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got, exp := strings.Split(b.String(), "\n"), strings.Split(string(want), "\n")
	for i := range max(len(got), len(exp)) {
		g, e := at(got, i), at(exp, i)
		if g != e {
			t.Fatalf("%s:%d:\n got %q\nwant %q", file, i+1, g, e)
		}
	}
}

func at(s []string, i int) string {
	if i < len(s) {
		return s[i]
	}
	return "(end)"
}

func tabulate(b *bytes.Buffer, w Word) {
	fmt.Fprintln(b, name(w))
	var refused []string
	for e := Event(0); e < NumEvents; e++ {
		n, eff := Next(w, e)
		if eff == Refused {
			refused = append(refused, e.String())
			continue
		}
		fmt.Fprintf(b, "\t%-13s %-40s %s\n", e, name(n), eff.names())
	}
	n, r := Adopt(w)
	fmt.Fprintf(b, "\t%-13s %-40s %s\n", "(adopted)", name(n), map[Remains]string{KeepFrame: "KeepFrame", PunchFrame: "PunchFrame"}[r])
	fmt.Fprintf(b, "\tRefused       %s\n", strings.Join(refused, " "))
}
