// Package policy decides which resident pages to give up and how many to read ahead. It knows nothing of the vm: it is told what happened and
// answers with runs of frames, so that a simulator can drive it (package sim).
//
// # What a policy can know
//
// There are no reference bits: a thread that uses a page it has mapped is seen by nobody. A policy is told of fills (a thread waited for one
// of the pages, or nobody did), of touches that happened to fault (another mapping, a first write), and of its own mistakes: a page that comes back
// soon after it was evicted (a refault) was in use. docs/policy.md says how well that does.
//
// # Frames, units, runs
//
// Everything is counted in frames of 4096 bytes, whatever the page size of the object: a page of 64 KiB is 16 frames. A unit is what comes and goes
// as one: a page of the object, or a whole extent of 512 frames that was filled as one folio. Units are aligned powers of two. A run is any number of
// frames of one object in a row; victims are whole units, and those that lie side by side are one run.
//
// # Concurrency
//
// A [Replacement] may be used by any number of goroutines. It has one mutex, a leaf: nothing is called and nothing waits while it is held. A
// [ReadAhead] is for one goroutine.
package policy

import (
	"fmt"
	"slices"
)

// MaxUnit is the largest unit in frames: an extent, 2 MiB.
const MaxUnit = 512

// Run is the frames [First, First+N) of an object. Frames are numbered from the beginning of the object, below 1<<48.
type Run struct {
	Object   uint64
	First, N int64
}

// Replacement chooses victims among the resident pages of all objects. It holds each resident frame exactly once, from its Fill until it is
// returned by Victims or taken away by Forget; so for one frame these calls must come in the order of what they tell, which they do if
// the page's owner makes them.
//
// Memory: 32 bytes for each unit that is resident, 4 bytes for each frame of the capacity to find them by, and 32 bytes for each frame of the capacity for ghosts, the units
// remembered after eviction (four, 8 bytes each); the last two rounded up to a power of two. Nothing is allocated while no more units are resident than ever before.
type Replacement interface {
	// Fill says that r became resident, in units of so many frames: a power of two from 1 to MaxUnit that r is aligned to at both ends. need is the frame
	// a thread waited for, -1: nobody did. Frames that are resident already are taken for new.
	Fill(r Run, unit, need int64)
	// Touch says that a resident frame was seen to be used: a fault that needed no contents. Other frames are ignored.
	Touch(object uint64, frame int64)
	// Forget says that r is resident no more without having been a victim: discarded, paged out on request, wired, the object has ended. What is
	// not resident is ignored; a run much longer than the number of resident units costs no more than they do. The mutex is given up in between. Of a unit that lies
	// only partly in r the rest stays, in smaller units.
	Forget(r Run)
	// Cold advises that the resident frames of r are not needed soon: they are the next victims, in the order of the advice. A unit that
	// lies only partly in r stays as it is.
	Cold(r Run)
	// Victims appends to dst runs of at least want frames to be evicted, if that many are resident, and returns it. They are resident no more. It may be more
	// by what belongs to the last run, at most MaxUnit frames. It holds the mutex for up to 0.3 us per unit: ask for no more than some hundred frames.
	Victims(want int64, dst []Run) []Run
	// Next appends to dst runs of at least want frames, if that many are resident and no more than some thousand units must be looked at, that would be victims one after the other if nothing else happened, and returns it. They stay
	// what they are. It is a forecast: neighbours that would go along with a victim are where their own turn is. It holds the mutex for up to 0.1 us per unit.
	Next(want int64, dst []Run) []Run
	// Keep says that r, in units of so many frames, was a victim but could not be evicted: it is resident again, at the end of the queue it came from. Unless there
	// is a Fill in between, all other resident frames will be victims before it.
	Keep(r Run, unit int64)
	// Resize says that the budget is capacity frames now. It is a hint: nothing bounds what may be resident.
	Resize(capacity int64)
	// Stats returns counts since New.
	Stats() Stats
}

// Stats of a Replacement. Counts are of frames but for Units, Refaults, Promotions and Demotions, which are of units.
type Stats struct {
	Resident   int64   // frames now
	Units      int64   // resident now
	Cold       int64   // frames now that Cold named
	Levels     []int64 // resident frames now at each level of protection, the least first
	Filled     int64
	Victims    int64
	Runs       int64 // that Victims returned
	Kept       int64
	Forgotten  int64
	Touched    int64 // visible touches of resident frames
	Refaults   int64 // a thread waited for a unit that was remembered
	Promotions int64 // refaults that raised the unit's level
	Demotions  int64 // refaults that lowered it
	Bytes      int64 // memory held
}

// Options for New.
type Options struct {
	// Capacity is the budget in frames; at least 1.
	Capacity int64
	// Seed makes two policies that are told the same behave the same; 0: random, so that no task can know which pages collide in the tables.
	Seed uint64
}

// Default is the policy to use when nobody says which.
const Default = "refault"

// Names of the policies, sorted.
func Names() []string { return slices.Sorted(slices.Values([]string{"fifo", Default})) }

// New makes the policy of that name; "": Default.
func New(name string, o Options) (Replacement, error) {
	if o.Capacity < 1 {
		return nil, fmt.Errorf("new policy: capacity of %d frames: at least one is needed", o.Capacity)
	}
	switch name {
	case "", Default:
		return newQueues(maxLevels, o), nil
	case "fifo":
		return newQueues(1, o), nil
	}
	return nil, fmt.Errorf("new policy: %q is none: one of %q is needed", name, Names())
}
