package pager

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

// stores are what snapshots are tested on.
var stores = map[string]func(testing.TB) store.Store{
	"memory": func(t testing.TB) store.Store { return memoryStore(t, nil) },
	"file":   func(t testing.TB) store.Store { return fileStore(t) },
	"slow": func(t testing.TB) store.Store {
		f := storetest.NewFaulty(memoryStore(t, nil))
		f.Inject(storetest.Fault{Label: "slow", On: storetest.OnRead | storetest.OnWrite, Delay: 50 * time.Microsecond})
		return f
	},
}

// checkEmpty closes a pager whose objects have ended, and looks for what is left.
func checkEmpty(t testing.TB, p *Pager, s store.Store) {
	t.Helper()
	for deadline := time.Now().Add(emmtest.Deadline); len(p.Objects()) > 0 || p.Info().Used > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("after the end of all objects: %+v, %d bytes used", p.Objects(), p.Info().Used)
			break
		}
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if n := p.shares.count(); n != 0 || len(p.shares.groups) != 0 {
		t.Errorf("%d slots and %d groups have shares after the end", n, len(p.shares.groups))
	}
	if used := s.Info().Used; used != 0 {
		t.Errorf("%d bytes leaked", used)
	}
}

// vm is a kernel and its object's port.
type vm struct {
	*emmtest.Kernel
	port emm.Port
}

// vmOf attaches a vm to an object that is there.
func vmOf(t emmtest.TB, p *Pager, port emm.Port, pageSize int) vm {
	k := vm{emmtest.NewKernel(t, p, port, pageSize), port}
	if kr := k.Init(); kr != emm.Success {
		t.Fatalf("Init: %v", kr)
	}
	return k
}

// snapshot makes a snapshot and attaches a vm to it.
func (k vm) snapshot(t emmtest.TB, p *Pager, pageSize int) vm {
	c := vm{port: emm.NewPort()}
	c.Kernel = emmtest.NewKernel(t, p, c.port, pageSize)
	c.Inherit(k.Kernel)
	if err := p.Snapshot(k.port, c.port); err != nil {
		t.Fatalf("%v", err)
	}
	if kr := c.Init(); kr != emm.Success {
		t.Fatalf("Init of a snapshot: %v", kr)
	}
	return c
}

// end ends the object, and waits for its loans.
func (k vm) end(p *Pager, loans ...*emmtest.Loan) {
	k.Terminate()
	p.NoSenders(k.port)
	for _, l := range loans {
		l.Wait()
	}
	k.Check()
}

func TestSnapshot(t *testing.T) {
	for name, open := range stores {
		for _, pageSize := range []int{4096, 64 << 10, 2 << 20} {
			for _, temporary := range []bool{false, true} {
				if pageSize == 2<<20 && (temporary || name == "slow" || raceEnabled) {
					continue // nothing new, and long
				}
				t.Run(fmt.Sprintf("%s/%d/%v", name, pageSize, temporary), func(t *testing.T) { testSnapshot(t, open(t), int64(pageSize), temporary) })
			}
		}
	}
}

func testSnapshot(t *testing.T, s store.Store, pageSize int64, temporary bool) {
	p := newPager(t, s)
	var k vm
	if k.port = emm.NewPort(); temporary {
		k.Kernel = emmtest.NewKernel(t, p, k.port, int(pageSize))
		if kr := k.Create(emm.NewPort(), 16*pageSize); kr != emm.Success {
			t.Fatal(kr)
		}
	} else if err := p.ObjectCreate(k.port, 16*pageSize, int(pageSize)); err != nil {
		t.Fatal(err)
	} else {
		k = vmOf(t, p, k.port, int(pageSize))
	}
	used := func(want int64, when string) {
		t.Helper()
		for deadline := time.Now().Add(emmtest.Deadline); p.Info().Used != want*pageSize; time.Sleep(time.Millisecond) { // a reader may be leaving
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d pages used, want %d", when, p.Info().Used/pageSize, want)
			}
		}
	}
	all := emm.Run{Size: 16 * pageSize}
	k.Write(0, emmtest.Fill(8, pageSize, 1))
	a := k.snapshot(t, p, int(pageSize))
	used(8, "snapshot")
	k.Read(all)
	a.Read(all)
	k.Write(0, emmtest.Fill(4, pageSize, 2))
	a.Write(2*pageSize, emmtest.Fill(4, pageSize, 3))
	used(14, "both written") // 4 and 4 of their own, 2 left over for each, 2 shared
	b := a.snapshot(t, p, int(pageSize))
	c := b.snapshot(t, p, int(pageSize))
	used(14, "snapshot of a snapshot of a snapshot")
	for _, x := range []vm{k, a, b, c} {
		x.Read(all)
	}
	a.Write(0, make([]byte, 8*pageSize)) // b and c have them
	used(14, "the middle one is zeros")
	b.end(p)
	used(14, "an end")
	k.end(p)
	used(8, "the first one's end")
	for _, x := range []vm{a, c} {
		x.Read(all)
		x.end(p)
	}
	checkEmpty(t, p, s)
}

func TestSnapshotErrors(t *testing.T) {
	s := memoryStore(t, nil)
	p := newPager(t, s)
	k, port := attach(t, p, 8, ps)
	_, other := attach(t, p, 8, ps)
	for _, c := range []struct{ source, copy emm.Port }{{emm.NewPort(), emm.NewPort()}, {port, other}, {port, port}, {port, emm.Port{}}, {emm.Port{}, emm.NewPort()}} {
		if err := p.Snapshot(c.source, c.copy); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("bad ports: %v", err)
		}
	}
	k.Write(0, emmtest.Fill(8, ps, 1))
	p.hook = func(step string) { // the port is taken while the map is copied
		if step == "snapshot.copied" {
			if err := p.ObjectCreate(emm.Port{1}, ps, ps); err != nil {
				t.Error(err)
			}
		}
	}
	if err := p.Snapshot(port, emm.Port{1}); !errors.Is(err, emm.InvalidArgument) {
		t.Errorf("a port that is taken meanwhile: %v", err)
	}
	if n := p.shares.count(); n != 0 {
		t.Errorf("%d shares left by a snapshot that failed", n)
	}
	p.hook = nil
	k.Read(run(0, 8))
	if got := len(p.Objects()); got != 3 {
		t.Errorf("%d objects, want 3", got)
	}

	failing := errors.New("no memory")
	var fail error
	q, err := New(Options{Store: memoryStore(t, nil), NewMemory: func(name string) (store.Memory, error) {
		if fail != nil {
			return nil, fail
		}
		return store.NewAnonymous(0)
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	_, port = attach(t, q, 8, ps)
	fail = failing
	if err := q.Snapshot(port, emm.NewPort()); !errors.Is(err, emm.ResourceShortage) || !errors.Is(err, failing) {
		t.Errorf("without memory for the map: %v", err)
	}
	fail = nil
	if err := q.Snapshot(port, emm.NewPort()); err != nil {
		t.Error(err)
	}
	q.Close()
	if err := q.Snapshot(port, emm.NewPort()); err == nil {
		t.Error("a snapshot after Close")
	}
}
