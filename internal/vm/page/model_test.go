package page

import (
	"flag"
	"testing"
)

var long = flag.Bool("long", false, "explore the largest configurations of the model too (two minutes, 4 GB)")

// invariant is what the package comment promises of each state, whether or not a thread sees it broken.
func invariant(s *state) string {
	w := Word(s.word)
	if err := wellFormed(w); err != nil {
		return "ill-formed word " + w.String() + ": " + err.Error()
	}
	for _, p := range s.ptes {
		if p >= protected && s.file == hole {
			return "BUG in the model: an entry without a page"
		}
		if p != writable || s.discarding { // what is discarded need not be protected: the punch takes the entries
			continue
		}
		switch w.State() {
		case Absent, Requested, Clean, Evicting, Error:
			return "a mapping can write a page that is " + w.String()
		}
	}
	return ""
}

// TestModel explores all interleavings under the rules as they are.
func TestModel(t *testing.T) {
	const (
		always = iota
		notRace
		notShort
		onlyLong
	)
	visited := [numPCs]bool{idle: true}
	for _, c := range []struct {
		name string
		when int
		config
	}{
		{"no crash", always, config{}},
		{"crash", notRace, config{crash: true, stray: true, signal: true}},
		{"lost entries", notShort, config{crash: true, stray: true, signal: true, zap: true}},
		{"discard, prefetch, around", notShort, config{crash: true, stray: true, discard: true, ahead: true}},
		{"rogue punches", notShort, config{crash: true, remove: true, limit: 3e6}},
		{"all with one reader a task", onlyLong, config{crash: true, stray: true, signal: true, remove: true, discard: true, ahead: true, limit: 10e6}},
		{"second reader", onlyLong, config{crash: true, stray: true, signal: true, second: true, limit: 20e6}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.when == onlyLong && !*long || c.when >= notShort && testing.Short() || c.when >= notRace && raceEnabled {
				t.Log("left out (see -short, -race and -long)")
				return
			}
			f := search(c.config, invariant, "")
			t.Log(f)
			if f.bad != "" {
				t.Fatal(f.report())
			}
			if !f.complete {
				t.Errorf("the bound of %d states was reached: what lies behind it is not checked", c.limit)
			}
			for i, v := range f.visited {
				visited[i] = visited[i] || v
			}
		})
	}
	if testing.Short() || raceEnabled {
		return
	}
	for p, v := range visited {
		// A page that is Requested is mapped nowhere, so CONTINUE cannot meet EEXIST there; the pager must be ready for it all the same.
		if !v && pc(p) != supplyAfterWake {
			t.Errorf("phase %d of the pager's work was never explored", p)
		}
	}
}

// mutant is a pager with one rule taken out, in the smallest world where that shows: the search must find want, and nothing with the rule in place.
func mutant(t *testing.T, c config, want string) {
	t.Helper()
	c.limit = 2e6
	f := search(c, nil, want) // nil: somebody must see it, a broken invariant is not enough
	t.Log(f)
	if f.bad == "" {
		t.Fatalf("no counterexample found; want %q", want)
	}
	t.Log(f.report())
	c.rules, c.limit = rules{}, 1e5 // TestModel goes to the end
	if f := search(c, invariant, ""); f.bad != "" {
		t.Errorf("with the rule: %s", f.report())
	}
}

const (
	stale   = "stale contents"
	zeros   = "zeros in place of data"
	waiting = "waits for ever"
)

// Without Busy a grant lands after a cleaner's protection: a page called Clean is writable. Or it lands after the punch.
func TestWithoutBusy(t *testing.T) {
	t.Run("late grant", func(t *testing.T) { mutant(t, config{rules: rules{noBusy: true}}, stale) })
	t.Run("grant after the punch", func(t *testing.T) { mutant(t, config{rules: rules{noBusy: true}}, zeros) })
}

// Contents other than zeros must not be filled Dirty first: after a crash the page would be zeros.
func TestZerosFirstForContents(t *testing.T) {
	mutant(t, config{rules: rules{zeroAny: true}, crash: true}, zeros)
}

// A write filled by one COPY makes the page writable while the word says Requested: adoption throws the write away.
func TestWithoutDirtyBeforeWritable(t *testing.T) {
	mutant(t, config{rules: rules{plainCopy: true}, crash: true}, stale)
}

// What lies in the file of a page that we Requested is not ours.
func TestEEXISTTakenAsDone(t *testing.T) {
	mutant(t, config{rules: rules{existIsDone: true}, stray: true}, zeros)
}

// Presence in the file proves nothing.
func TestAdoptionTrustsPresence(t *testing.T) {
	mutant(t, config{rules: rules{adoptPresence: true}, crash: true, stray: true}, zeros)
}

// The store may lack what was being returned.
func TestAdoptionTakesCleaningForClean(t *testing.T) {
	mutant(t, config{rules: rules{adoptClean: true}, crash: true}, stale)
}

// The messages that the dead pager had read are lost.
func TestAdoptionWithoutWake(t *testing.T) {
	mutant(t, config{rules: rules{adoptNoWake: true}, crash: true}, waiting)
}

// A dropped fault lives on only in Waiters.
func TestEndWithoutWake(t *testing.T) { mutant(t, config{rules: rules{noWake: true}}, waiting) }

func TestProtectOneMappingOnly(t *testing.T) {
	mutant(t, config{rules: rules{protectOne: true}}, stale)
}

func TestReadBeforeProtect(t *testing.T) {
	mutant(t, config{rules: rules{readFirst: true}}, stale)
}

func TestPunchUnstored(t *testing.T) {
	mutant(t, config{rules: rules{punchUnstored: true}}, stale)
}

// When a task punched a Dirty page, zeros are what it wrote; the manager's contents are older.
func TestLostDirtyAskedAgain(t *testing.T) {
	mutant(t, config{rules: rules{lostDirtyAsked: true}, remove: true}, stale)
}
