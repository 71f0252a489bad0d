package vm

import (
	"cmp"
	"slices"
	"strings"

	"machpager/internal/vm/page"
)

// Dump is what a vm has, for people: the parts are looked at one after the other, while all goes on.
type Dump struct {
	Stats    Stats        `json:"stats"`
	Tasks    []TaskDump   `json:"tasks"`
	Objects  []ObjectDump `json:"objects"`
	Waits    []Wait       `json:"waits"` // what is out, oldest first
	Wired    int64        `json:"wired_frames"`
	InFlight int64        `json:"in_flight_frames"` // of victims that managers have not stored yet
	Wanted   int64        `json:"wanted_frames"`    // that faults and Populate wait for
}

// TaskDump is a task and what it maps.
type TaskDump struct {
	ID       uint64        `json:"id"`
	PID      int           `json:"pid"`
	Mappings []MappingDump `json:"mappings"`
}

// MappingDump is a mapping, in bytes.
type MappingDump struct {
	ID       uint64       `json:"id"`
	Object   uint64       `json:"object"`
	Off      int64        `json:"off"`
	Size     int64        `json:"size_bytes"`
	ReadOnly bool         `json:"read_only"`
	Places   []Place      `json:"places"` // in the task; none: not mapped there yet, or any more
	Stats    MappingStats `json:"stats"`
}

// Place is where a piece of a mapping is.
type Place struct {
	Address uint64 `json:"address"`
	Off     int64  `json:"off"`
	Size    int64  `json:"size_bytes"`
}

// PageCounts are pages by state, and by what else their words say.
type PageCounts struct {
	Absent    int64 `json:"absent"`
	Requested int64 `json:"requested"`
	Clean     int64 `json:"clean"`
	Dirty     int64 `json:"dirty"`
	Cleaning  int64 `json:"cleaning"`
	Evicting  int64 `json:"evicting"`
	Error     int64 `json:"error"`
	Busy      int64 `json:"busy"`
	Waiters   int64 `json:"waiters"`
	Precious  int64 `json:"precious"`
	Wired     int64 `json:"wired"`
}

func (c *PageCounts) add(w page.Word) {
	*[...]*int64{&c.Absent, &c.Requested, &c.Clean, &c.Dirty, &c.Cleaning, &c.Evicting, &c.Error, new(int64)}[w.State()]++
	for _, x := range []struct {
		set bool
		n   *int64
	}{{w.Busy(), &c.Busy}, {w.Waiters(), &c.Waiters}, {w&page.Precious != 0, &c.Precious}, {w.Wired() > 0, &c.Wired}} {
		if x.set {
			*x.n++
		}
	}
}

// ObjectDump is an object and its pages.
type ObjectDump struct {
	ID          uint64     `json:"id"`
	Size        int64      `json:"size_bytes"`
	PageSize    int64      `json:"page_size"`
	ResidentMin int64      `json:"resident_min_bytes"`
	ResidentMax int64      `json:"resident_max_bytes"` // 0: none
	Frames      int64      `json:"frames"`             // reserved for it
	Stuck       int64      `json:"stuck_frames"`       // of those: a punch left them in the file
	Temporary   bool       `json:"temporary"`          // its contents end with it
	Managed     bool       `json:"managed"`            // it has a manager; false: it was never paged out
	Pages       PageCounts `json:"pages"`
	Map         string     `json:"map"` // one sign for the same number of pages each, for the most changed of them: see MapSigns
	Mappings    int        `json:"mappings"`
	Returned    int64      `json:"returned_pages"`
	Evicted     int64      `json:"evicted_pages"`
}

// mapWidth is how many signs a map has at most.
const mapWidth = 64

// MapSigns are the signs of a map, from the one that matters least: absent, clean, moving (requested, cleaning, evicting), dirty, error.
const MapSigns = "·░+█!"

var mapSigns = []rune(MapSigns)

// signOf is the place of a state in MapSigns.
func signOf(s page.State) int {
	return [...]int{page.Absent: 0, page.Requested: 2, page.Clean: 1, page.Dirty: 3, page.Cleaning: 2, page.Evicting: 2, page.Error: 4, 7: 4}[s]
}

// Dump looks at everything. It costs a walk over all page tables.
func (v *VM) Dump() Dump {
	d := Dump{Stats: v.Stats(), Waits: v.waits(), Wired: v.wired.Load(), InFlight: v.inflight.Load(), Wanted: v.wanted.Load()}
	v.mu.Lock()
	tasks := make([]*Task, 0, len(v.tasks))
	for _, t := range v.tasks {
		tasks = append(tasks, t)
	}
	v.mu.Unlock()
	for _, t := range tasks {
		d.Tasks = append(d.Tasks, t.dump())
	}
	for _, o := range v.allObjects() {
		if x, ok := o.dump(); ok {
			d.Objects = append(d.Objects, x)
		}
	}
	slices.SortFunc(d.Tasks, func(a, b TaskDump) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(d.Objects, func(a, b ObjectDump) int { return cmp.Compare(a.ID, b.ID) })
	return d
}

func (t *Task) dump() TaskDump {
	t.mu.Lock()
	maps := slices.Clone(t.maps)
	t.mu.Unlock()
	d := TaskDump{ID: t.id, PID: t.pid}
	for _, m := range maps {
		x := MappingDump{ID: m.id, Object: m.obj.id, Off: m.off, Size: m.size, ReadOnly: m.readOnly, Stats: m.Stats()}
		for _, s := range *m.spans.Load() {
			x.Places = append(x.Places, Place{s.addr, s.off, s.n})
		}
		d.Mappings = append(d.Mappings, x)
	}
	return d
}

// dump is false for an object that has ended.
func (o *Object) dump() (ObjectDump, bool) {
	if !o.gate.enter() {
		return ObjectDump{}, false
	}
	defer o.gate.leave()
	d := ObjectDump{ID: o.id, Size: o.Size(), PageSize: o.pageSize, ResidentMin: o.room.min * frameSize, ResidentMax: o.room.max * frameSize, Frames: o.resident.Load(),
		Stuck: o.stuck.Load(), Temporary: o.temporary(), Managed: o.binding.Load() != nil, Mappings: len(*o.maps.Load()), Returned: o.stats.returned.Load(), Evicted: o.stats.evicted.Load()}
	n := o.npages()
	each := (n + mapWidth - 1) / mapWidth
	signs := make([]int, (n+each-1)/each)
	walk, seen := touched{o: o}, int64(0)
	for p := walk.next(0, n); p < n; p = walk.next(p+1, n) {
		w := o.word(p)
		d.Pages.add(w)
		seen++
		signs[p/each] = max(signs[p/each], signOf(w.State()))
	}
	d.Pages.Absent += n - seen
	var b strings.Builder
	for _, s := range signs {
		b.WriteRune(mapSigns[s])
	}
	d.Map = b.String()
	return d, true
}
