package pager

import (
	"bytes"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
	"machpager/pager/store"
	"machpager/pager/store/memory"
)

func TestRestart(t *testing.T) {
	w := newWorld()
	p, _ := w.boot(t)
	k, port := attach(t, p, 64, ps)
	other, gone := attach(t, p, 64, ps)
	data := emmtest.Fill(40, ps, 1)
	k.Write(0, data)
	k.Write(10*ps, make([]byte, 5*ps))
	other.Write(0, emmtest.Fill(8, ps, 2))
	other.Terminate()
	p.NoSenders(gone)
	temporary := emm.NewPort()
	tk := emmtest.NewKernel(t, p, temporary, ps)
	tk.Create(emm.NewPort(), ps)
	tk.Give(3*ps, emmtest.Fill(4, ps, 3), true).Wait()

	// Killed, without a word.
	w = w.copy(t)
	p, f := w.boot(t)
	if used := f.Info().Used; used != 39*ps {
		t.Errorf("%d slots used after the restart, want 39", used/ps)
	}
	infos := p.Objects()
	if len(infos) != 2 || infos[0].Stored != 35*ps || infos[1].Stored != 4*ps || !infos[1].Temporary || infos[0].Attached {
		t.Errorf("objects after the restart: %+v", infos)
	}
	k = emmtest.NewKernel(t, p, port, ps)
	if kr := k.Init(); kr != emm.Success {
		t.Fatal(kr)
	}
	k.Unasked = true
	clear(data[10*ps : 15*ps])
	for i, a := range readRaw(t, p, k, port, 64) {
		want := make([]byte, ps)
		if i < 40 {
			want = data[i*ps : (i+1)*ps]
		}
		if !bytes.Equal(a, want) {
			t.Errorf("page %d is wrong after the restart", i)
		}
	}
	tk = emmtest.NewKernel(t, p, temporary, ps)
	if kr := tk.Init(); kr != emm.Success {
		t.Errorf("Init of a temporary object after the restart: %v", kr)
	}
	tk.Terminate()
	if p.lookup(temporary) != nil {
		t.Error("a temporary object outlived its Terminate")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if used := f.Info().Used; used != 0 {
		t.Errorf("%d slots leaked", used/ps)
	}
}

// The pager is killed at each step that the store sees, in a history of returns, and restarted: each page has what was completed last, or, if a return was in
// progress, what that brought. Never anything else, and no slot is lost.
func TestKilledAtAnyStep(t *testing.T) {
	w := newWorld()
	p, f := w.boot(t)
	k, port := attach(t, p, 32, ps)
	type state struct {
		w         *world
		step      string
		last, now [32]uint64 // contents by page: completed, and being returned
	}
	var states []state
	var last, now [32]uint64
	f.Step(func(step string) {
		if len(states) < 150 {
			states = append(states, state{w.copy(t), step, last, now})
		}
	})
	for v := uint64(1); v < 20; v++ {
		first, n := int(v*7%24), int(1+v%8)
		data := make([]byte, 0, n*ps)
		for i := range n {
			if (v+uint64(i))%5 == 0 {
				now[first+i] = 0
				data = append(data, make([]byte, ps)...)
			} else {
				now[first+i] = v
				data = append(data, contents(v, first+i)...)
			}
		}
		if kr := k.Write(int64(first)*ps, data); kr != emm.Success {
			t.Fatal(kr)
		}
		last = now
	}
	f.Step(nil)
	if len(states) < 60 {
		t.Fatalf("only %d steps", len(states))
	}
	seen := map[string]bool{}
	for i, s := range states {
		seen[s.step] = true
		p, f := s.w.boot(t)
		k := emmtest.NewKernel(t, p, port, ps)
		if kr := k.Init(); kr != emm.Success {
			t.Fatal(kr)
		}
		stored := int64(0)
		for page, got := range readRaw(t, p, k, port, 32) {
			if !bytes.Equal(got, contents(s.last[page], page)) && !bytes.Equal(got, contents(s.now[page], page)) {
				t.Errorf("killed at step %d (%s): page %d is neither version %d nor %d", i, s.step, page, s.last[page], s.now[page])
			}
			if !bytes.Equal(got, make([]byte, ps)) {
				stored++
			}
		}
		if used := f.Info().Used / ps; used != stored {
			t.Errorf("killed at step %d (%s): %d slots used for %d pages", i, s.step, used, stored)
		}
		p.Close()
		if used := f.Info().Used; used != 0 {
			t.Errorf("killed at step %d (%s): %d slots leaked", i, s.step, used/ps)
		}
	}
	for _, step := range []string{"alloc", "allocated", "write", "written", "free", "freed"} {
		if !seen[step] {
			t.Errorf("never killed at %q", step)
		}
	}
}

func contents(version uint64, page int) []byte {
	if version == 0 {
		return make([]byte, ps)
	}
	return emmtest.Fill(1, ps, version<<16|uint64(page))
}

// A temporary object is killed at each step of its life. Who takes over may not know whether Create was heard, nor whether what it gave was stored: Create again is Init, and
// what is given again counts, not what came first.
func TestTemporaryKilled(t *testing.T) {
	w := newWorld()
	p, f := w.boot(t)
	type state struct {
		w     *world
		step  string
		given bool // the first contents were stored, and the vm knows
		ended bool // Terminate was sent
	}
	var states []state
	now := state{}
	record := func(step string) {
		s := now
		s.w, s.step = w.copy(t), step
		states = append(states, s)
	}
	f.Step(record)
	p.hook = record
	port, old := emm.NewPort(), emmtest.Fill(4, ps, 1)
	k := emmtest.NewKernel(t, p, port, ps)
	if kr := k.Create(emm.NewPort(), 8*ps); kr != emm.Success {
		t.Fatal(kr)
	}
	k.Give(0, old, true).Wait()
	now.given = true
	record("given")
	now.ended = true
	k.Terminate()
	waitReleased(t, p)
	record("ended")
	f.Step(nil)
	p.hook = nil

	// read is Create, a look at the first pages, and Terminate.
	read := func(w *world, what string, want []byte) {
		t.Helper()
		p, f := w.boot(t)
		c := &collector{Kernel: emmtest.NewKernel(t, p, port, ps), pages: make(map[int64][]byte)}
		h := emm.Head{Control: c}
		if kr := p.Create(h, port, 8*ps, ps); kr != emm.Success {
			t.Fatal(what, kr)
		}
		p.DataRequest(h, emm.Run{Size: 4 * ps}, 0, emm.ProtRead)
		for page := range 4 {
			if !bytes.Equal(c.pages[int64(page)], want[page*ps:(page+1)*ps]) {
				t.Errorf("%s: page %d is wrong", what, page)
			}
		}
		p.Terminate(h)
		checkEmpty(t, p, f)
	}
	seen := map[string]bool{}
	newer := emmtest.Fill(4, ps, 2)
	for i, s := range states {
		seen[s.step] = true
		what := fmt.Sprintf("killed at step %d (%s)", i, s.step)
		again := s.w.copy(t)
		p, _ := s.w.boot(t)
		known := p.lookup(port) != nil
		if s.given && !s.ended && !known {
			t.Errorf("%s: the object is lost", what)
		}
		k := emmtest.NewKernel(t, p, port, ps)
		if kr := k.Create(emm.NewPort(), 8*ps); kr != emm.Success {
			t.Fatalf("%s: Create again: %v", what, kr)
		}
		k.Give(0, newer, true).Wait()
		read(s.w.copy(t), what+", given again", newer)
		if s.given && known {
			read(again, what, old)
		}
	}
	for _, step := range []string{"pager.reserved", "pager.mapped", "pager.published", "pager.allocated", "written", "pager.stored", "pager.committed", "given", "pager.dropped",
		"pager.release", "freed", "pager.released"} {
		if !seen[step] {
			t.Errorf("never killed at %q", step)
		}
	}
	p.Close()
}

// waitReleased waits until no object is left.
func waitReleased(t *testing.T, p *Pager) {
	t.Helper()
	for deadline := time.Now().Add(emmtest.Deadline); ; time.Sleep(100 * time.Microsecond) {
		p.mu.Lock()
		busy := p.busy()
		p.mu.Unlock()
		if !busy {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("an object is not released")
		}
	}
}

// What nobody claims after a restart ends, with its slots; what a vm has, or somebody knows, does not.
func TestClaim(t *testing.T) {
	w := newWorld()
	p, _ := w.boot(t)
	var ports []emm.Port
	for i := range 6 {
		k, port := attach(t, p, 8, ps)
		k.Write(0, emmtest.Fill(8, ps, uint64(i)))
		ports = append(ports, port)
	}
	tk := emmtest.NewKernel(t, p, emm.NewPort(), ps)
	tk.Create(emm.NewPort(), ps)
	tk.Give(0, emmtest.Fill(4, ps, 9), true).Wait()
	if err := p.Snapshot(ports[0], emm.NewPort()); err != nil { // its port is known to nobody any more
		t.Fatal(err)
	}
	w = w.copy(t)
	p, f := w.boot(t)
	k := emmtest.NewKernel(t, p, ports[1], ps)
	if kr := k.Init(); kr != emm.Success {
		t.Fatal(kr)
	}
	asked := 0
	ended := p.Claim(func(port emm.Port) bool { asked++; return port == ports[0] })
	if ended != 6 || asked != 8 {
		t.Errorf("%d of 8 objects ended, want 6; asked about %d", ended, asked)
	}
	if n := p.Claim(func(emm.Port) bool { return true }); n != 0 {
		t.Errorf("claimed, and ended all the same: %d", n)
	}
	for deadline := time.Now().Add(emmtest.Deadline); f.Info().Used != 16*ps; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes used, want those of 2 objects", f.Info().Used)
		}
	}
	for i, port := range ports {
		if known := p.lookup(port) != nil; known != (i < 2) {
			t.Errorf("object %d is known: %v", i, known)
		}
	}
	k.Terminate()
	p.NoSenders(ports[0])
	p.NoSenders(ports[1])
	checkEmpty(t, p, f)
}

// What an object that ended left in its map is not the next one's, even if the pager was killed before it closed the map.
func TestRestartWithStaleMap(t *testing.T) {
	w := newWorld()
	p, _ := w.boot(t)
	k, port := attach(t, p, 8, ps)
	k.Write(0, emmtest.Fill(8, ps, 1))
	p.mu.Lock()
	p.table.drop(0) // the first step of the end, and then the kill
	p.mu.Unlock()
	w = w.copy(t)
	p, f := w.boot(t)
	if len(p.Objects()) != 0 || f.Info().Used != 0 {
		t.Errorf("after the restart: %v, %d bytes used", p.Objects(), f.Info().Used)
	}
	k, _ = attach(t, p, 8, ps)
	for i, a := range k.Read(run(0, 8)) {
		if a.Kind != emmtest.Unavailable {
			t.Errorf("page %d of a new object: %v", i, a.Kind)
		}
	}
	if p.lookup(port) != nil {
		t.Error("the old port is known")
	}
	p.Close()
}

func TestBrokenTable(t *testing.T) {
	w := newWorld()
	mem, err := w.open("objects")
	if err != nil {
		t.Fatal(err)
	}
	if err := mem.Grow(ps); err != nil {
		t.Fatal(err)
	}
	mem.Words()[0].Store(42)
	if p, err := New(Options{Store: memoryStore(t, nil), NewMemory: w.open}); err == nil {
		p.Close()
		t.Error("a table of another version was taken")
	}

	// A slot that two pages name, other than the same page of an object and its snapshot.
	for _, c := range []struct{ from, to, fromPage, toPage int }{{0, 1, 3, 4}, {0, 0, 3, 2}, {2, 0, 3, 3}, {0, 2, 3, 3}, {2, 2, 5, 6}, {2, 0, 4, 7}} {
		w := newWorld()
		p, _ := w.boot(t)
		for _, pageSize := range []int64{ps, ps, 2 * ps} {
			k, _ := attach(t, p, 8, int(pageSize))
			k.Write(0, emmtest.Fill(8, pageSize, 1))
		}
		w = w.copy(t)
		words := func(id int) []atomic.Uint64 { return w.mem[mapName(id)].Words() }
		words(c.to)[c.toPage].Store(words(c.from)[c.fromPage].Load())
		contents, err := w.open("contents")
		if err != nil {
			t.Fatal(err)
		}
		s, err := memory.New(contents, nil)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := New(Options{Store: s, NewMemory: w.open}); err == nil {
			p.Close()
			t.Errorf("%+v: a slot of two pages was taken", c)
		} else if !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("%+v: %v", c, err)
		}
		p.Close()
	}
}

// The table grows with the objects.
func TestManyObjects(t *testing.T) {
	w := newWorld()
	p, _ := w.boot(t)
	var ports []emm.Port
	for i := range 150 {
		port := emm.NewPort()
		if err := p.ObjectCreate(port, int64(i+1)*ps, ps<<(i%10)); err != nil {
			t.Fatal(err)
		}
		ports = append(ports, port)
	}
	for i := 0; i < 150; i += 3 {
		p.NoSenders(ports[i])
	}
	want := fmt.Sprint(p.Objects())
	w = w.copy(t)
	q, _ := w.boot(t)
	if got := fmt.Sprint(q.Objects()); got != want || len(q.Objects()) != 100 {
		t.Errorf("objects after the restart: %d\n%s\nwant\n%s", len(q.Objects()), got, want)
	}
	for i, port := range ports {
		if known := q.lookup(port) != nil; known != (i%3 != 0) {
			t.Errorf("object %d is known: %v", i, known)
		}
	}
	p.Close()
	q.Close()
}
