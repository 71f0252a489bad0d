package vm

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"machpager/internal/frames"
	"machpager/pager/emm"
)

// Here the pager is a process of its own, so that it can be killed at any instruction: this test binary again. The test is its guardian: it holds the mount, tables, files, the
// managers' stores and the tasks' userfaultfds, and hands them to the next one. Every one adopts, also the first: from an empty table.

const pagerRole = "vm-test-pager"

// bother does what a pager does of its own accord, or on request, without changing the contents.
func (o *Object) bother(ctx context.Context, rng *rand.Rand) {
	for ctx.Err() == nil {
		off := rng.Int64N(o.Size())
		n := min(o.Size()-off, 1+rng.Int64N(1<<rng.IntN(20)))
		switch rng.IntN(6) {
		case 0:
			o.Snapshot(ctx, func(emm.Port) error { return nil })
		case 1, 2:
			o.Sync(ctx, off, n)
		default:
			o.PageOut(ctx, off, n)
		}
	}
}

// The pager is killed again and again, at random instants, while tasks check every value they read, under a budget that makes pages come and go all the time.
func TestKilledPager(t *testing.T) {
	for _, c := range []struct {
		kind         frames.Kind
		budget, size int64
		ps           int
		cluster      int64
	}{{frames.Tmpfs, 4 << 20, 8 << 20, 4096, 0}, {frames.Tmpfs, 24 << 20, 16 << 20, 4096, 2 << 20}, {frames.Memfd, 2 << 20, 8 << 20, 65536, 0}} {
		t.Run(fmt.Sprintf("%v,budget=%d,page=%d,cluster=%d", c.kind, c.budget, c.ps, c.cluster), func(t *testing.T) {
			m := newMortal(t, c.kind, c.budget)
			m.l.Busy = true
			a := m.object(legacyObject{Size: c.size, PageSize: c.ps, Cluster: c.cluster})
			b := m.object(legacyObject{Size: c.size / 2, PageSize: c.ps, Cluster: c.cluster, Internal: true})
			seconds := 1.5
			var wg sync.WaitGroup
			m.start("")
			for i := range 2 {
				for _, id := range []int{a, b} {
					x := m.task(id)
					wg.Go(func() {
						r := x.do(order{Op: "stress", ID: id, N: m.l.Objects[id].Size, Seconds: seconds, Seed: m.l.Seed, Slot: i, Slots: 2, Threads: 2}, nil)
						if r.Wrong > 0 || r.Ops == 0 {
							t.Errorf("%d wrong values in %d operations", r.Wrong, r.Ops)
						}
					})
				}
			}
			m.kill() // it knows of no task
			kills := 0
			for end := time.Now().Add(time.Duration(seconds * float64(time.Second))); time.Now().Before(end); kills++ {
				m.start("")
				time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
				m.kill()
			}
			m.start("")
			wg.Wait()
			m.check()
			t.Logf("%d pagers killed", kills)
			if kills < 5 {
				t.Errorf("only %d pagers were killed", kills)
			}
		})
	}
}

// failpoints are the names in this package's files, in order.
func failpoints(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal("no sources here")
	}
	var names []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(f, "_test.go") {
			for _, m := range regexp.MustCompile(`failpoint\.Here\("([^"]+)"\)`).FindAllStringSubmatch(string(b), -1) {
				names = append(names, m[1])
			}
		}
	}
	slices.Sort(names)
	return names
}

// Every failpoint is in the page that describes the states, once.
func TestFailpointsAreListed(t *testing.T) {
	names := failpoints(t)
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("a name stands for two places: %q", names)
	}
	b, err := os.ReadFile("../../docs/pagestates.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if n := strings.Count(string(b), "`"+name+"`"); n != 1 {
			t.Errorf("docs/pagestates.md names %s %d times", name, n)
		}
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z]+\\.[a-z-]+)` \\|").FindAllStringSubmatch(string(b), -1) {
		if !slices.Contains(names, m[1]) {
			t.Errorf("docs/pagestates.md names %s, which there is not", m[1])
		}
	}
}

// The pager is killed at every failpoint, the first time it comes by or a later one, while two tasks check every value, and a third one's pages are discarded, cut off, and must be neither stale nor lost; what
// the dead pager did not finish is asked for again. The object has a manager or, in the second half, is a temporary one.
func TestKilledAtEveryFailpoint(t *testing.T) {
	names := failpoints(t)
	if raceEnabled { // a process starts in a fifth of a second then: a third of them, others each time
		rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		names = names[:len(names)/3]
	}
	m := newMortal(t, frames.Tmpfs, 16<<20)
	m.l.Busy = true
	a := m.object(legacyObject{Size: 4 << 20, PageSize: 4096})
	b := m.object(legacyObject{Size: 2 << 20, PageSize: 4096, Internal: true})
	c := m.object(legacyObject{Size: 512 << 10, PageSize: 4096, Temporary: true})
	e := m.object(legacyObject{Size: 2 << 20, PageSize: 4096, Cluster: 2 << 20})
	met := map[string]bool{}
	if m.start("pageout.created=1:kill") { // it comes once in an object's life, here with a snapshot
		m.died(true)
	}
	met["pageout.created"] = true
	z, z2 := m.task(c, e), m.task(e)
	var wg sync.WaitGroup
	const seconds = 3
	for i, id := range []int{a, b, a} {
		x := m.task(id)
		wg.Go(func() {
			r := x.do(order{Op: "stress", ID: id, N: m.l.Objects[id].Size, Seconds: seconds, Seed: m.l.Seed, Slot: i / 2, Slots: 2, Threads: 1}, nil)
			if r.Wrong > 0 || r.Ops == 0 {
				t.Errorf("object %d: %d wrong values in %d operations", id, r.Wrong, r.Ops)
			}
		})
	}
	const pages = 128
	version, meddle := byte(0), false
	// round fills the third task's object, discards a part, cuts another off, and looks. With a failpoint armed, the pager may die in any of it.
	round := func() {
		alive := true
		ask := func(q pagerOrder) { // as a task does: until it is answered
			for {
				var r verdict
				if alive {
					r, alive = m.ask(q)
				}
				if alive {
					if r.Err != "" {
						t.Fatalf("%+v: %s", q, r.Err)
					}
					if q.Op == "setsize" {
						m.l.Objects[c].Length = q.N
					}
					return
				}
				m.died(true)
				alive = m.start("")
			}
		}
		version++
		fill := bytes.Repeat([]byte{version}, 65536)
		wrote := make(chan bool, 1)
		go func() {
			for off := int64(0); off < pages*4096; off += 65536 {
				z.write(c, off, fill)
			}
			wrote <- true
		}()
		for done := false; !done; { // the pager may die under the writer: then it waits, and another comes
			select {
			case done = <-wrote:
			case <-m.gone:
				m.died(true)
				alive = m.start("")
			}
		}
		ask(pagerOrder{Op: "map", Mapping: m.l.Tasks[0].Mappings[0].ID, Object: a, N: 1 << 20})
		ask(pagerOrder{Op: "create"})
		ask(pagerOrder{Op: "pageout", Object: c, Off: 0, N: pages / 2 * 4096})
		ask(pagerOrder{Op: "discard", Object: c, Off: pages / 4 * 4096, N: pages / 2 * 4096})
		ask(pagerOrder{Op: "setsize", Object: c, N: pages * 7 / 8 * 4096})
		ask(pagerOrder{Op: "setsize", Object: c, N: pages * 4096})
		ask(pagerOrder{Op: "pageout", Object: e, N: m.l.Objects[e].Size}) // so that a whole extent comes in
		ask(pagerOrder{Op: "populate", Mapping: m.l.Tasks[0].Mappings[0].ID, N: 8 * 4096})
		if meddle { // as a task can that has the file
			if _, err := m.e.objs[c].file.WriteAt([]byte{99}, pages/2*4096); err != nil {
				t.Fatal(err)
			}
		}
		want := bytes.Repeat([]byte{version}, pages*4096)
		clear(want[pages/4*4096 : pages*3/4*4096])
		clear(want[pages*7/8*4096:])
		looked := make(chan bool, 1)
		go func() {
			z.do(order{Op: "drop", ID: c, Off: pages * 7 / 8 * 4096, N: pages / 8 * 4096}, nil)
			for off := int64(0); off < pages*4096; off += 32768 {
				if got := z.read(c, off, 32768); !bytes.Equal(got, want[off:off+32768]) {
					t.Errorf("version %d: wrong bytes behind %d", version, off)
				}
			}
			z.read(e, 0, 1)
			for p := int64(1); p < 512; p += 32 {
				z2.read(e, p*4096, 1) // resident, unless somebody pages it out just now, and not mapped there
			}
			looked <- true
		}()
		for done := false; !done; {
			select {
			case done = <-looked:
			case <-m.gone:
				m.died(true)
				alive = m.start("")
			}
		}
	}
	for _, name := range names {
		if t.Failed() || met[name] {
			continue
		}
		for _, nth := range []int{1 + rand.IntN(2)*rand.IntN(20), 1, 1, 1, 1} {
			if !m.start(fmt.Sprintf("%s=%d:kill", name, nth)) {
				m.start("")
				met[name] = true
			}
			meddle = name == "install.overwritten"
			process := m.cmd
			round()
			if m.cmd != process {
				met[name] = true
			}
			m.kill()
			if met[name] {
				break
			}
		}
	}
	m.start("")
	wg.Wait()
	m.check()
	for _, name := range names {
		if !met[name] {
			t.Errorf("nobody was killed at %s", name)
		}
	}
	t.Logf("killed at %d of %d failpoints, %d rounds", len(met), len(names), version)
}
