package tiered

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/store"
	"machpager/pager/store/compressed"
	"machpager/pager/store/file"
	"machpager/pager/store/storetest"
)

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(storetest.Deadline); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, storetest.Deadline)
		}
	}
}

func put(t testing.TB, s store.Store, n int, k storetest.Kind, seed uint64) (store.Slot, []byte) {
	t.Helper()
	slot, m, err := s.Alloc(n, n)
	if err != nil || m != n {
		t.Fatal(m, err)
	}
	b := make([]byte, n*store.SlotSize)
	storetest.FillKind(b, k, seed)
	if _, err := storetest.Do(t, s.Write, slot, b); err != nil {
		t.Fatal(err)
	}
	return slot, b
}

func expect(t testing.TB, s store.Store, slot store.Slot, want []byte) {
	t.Helper()
	got := bytes.Repeat([]byte{0xaa}, len(want))
	if _, err := storetest.Do(t, s.Read, slot, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("slot %d: %v, equal %v", slot, err, bytes.Equal(got, want))
	}
}

// Eight times what the fast tier holds: the oldest goes to the file, the newest stays, and all of it is right.
func TestColdContentsMove(t *testing.T) {
	const limit = 4 << 20
	x := open(t, Options{}, limit)
	type run struct {
		slot store.Slot
		want []byte
	}
	var runs []run
	for i := range 8 * limit / (64 * store.SlotSize) {
		slot, want := put(t, x.s, 64, storetest.Random, uint64(i))
		runs = append(runs, run{slot, want})
		if i%8 == 7 { // the mover keeps up with this
			eventually(t, "room in the fast tier", func() bool { return x.s.room() >= x.s.reserve })
		}
	}
	st := x.s.Stats()
	if st.Demoted < 4*limit/store.SlotSize || st.Fast == 0 || st.Fast+st.Slow != int64(64*len(runs)) {
		t.Errorf("stats: %+v", st)
	}
	for _, r := range runs {
		expect(t, x.s, r.slot, r.want)
	}
	for _, r := range runs {
		x.s.Free(r.slot, 64)
	}
	if st := x.s.Stats(); st.Fast != 0 || st.Slow != 0 {
		t.Errorf("emptied: %+v", st)
	}
	if f, s := x.fast.Info().Used, x.slow.Info().Used; f+s != 0 {
		t.Errorf("leaked: %d and %d bytes", f, s)
	}
}

// A slow tier that hangs holds nobody up but those who read from it; writes go on while the fast tier has room, and those beyond it wait for nothing but their Done.
func TestHangingSlowTier(t *testing.T) {
	x := open(t, Options{}, 2<<20)
	old, oldWant := put(t, x.s, 256, storetest.Random, 1)
	put(t, x.s, 256, storetest.Random, 2)
	eventually(t, "something in the slow tier", func() bool { return x.s.Stats().Slow > 0 })
	eventually(t, "the mover at rest", func() bool { return x.s.room() >= 2*x.s.reserve || x.s.Stats().Fast == 0 })

	hold := make(chan struct{})
	off := x.slow.Inject(storetest.Fault{Label: "hang", On: storetest.OnRead | storetest.OnWrite, Hold: hold})
	var pending []chan error
	b := make([]byte, 64*store.SlotSize)
	storetest.Fill(b, 3)
	start := time.Now()
	for range 32 { // 8 MiB, of which the slow tier must take 6
		slot, m, err := x.s.Alloc(64, 64)
		if err != nil || m != 64 {
			t.Fatal(m, err)
		}
		done := make(chan error, 1)
		x.s.Write(&store.Op{Slot: slot, Data: b, Done: func(op *store.Op) { done <- op.Err }})
		pending = append(pending, done)
	}
	read := make(chan error, 1)
	got := make([]byte, len(oldWant))
	x.s.Read(&store.Op{Slot: old, Data: got, Done: func(op *store.Op) { read <- op.Err }})
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("writes and reads blocked their callers for %v", d)
	}
	served := 0
	for _, done := range pending {
		served += len(done)
	}
	if served < 2 {
		t.Errorf("%d writes of 256 KiB were done while the slow tier hung and 2 MiB of the fast one were free", served)
	}
	close(hold)
	off()
	for _, done := range pending {
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(storetest.Deadline):
			t.Fatal("a write hangs")
		}
	}
	if err := <-read; err != nil || !bytes.Equal(got, oldWant) {
		t.Errorf("read: %v", err)
	}
	expect(t, x.s, old, oldWant)
}

// Every call of both tiers fails now and then, contents move all the time: nothing is lost, nothing is wrong, nothing leaks.
func TestFailingTiers(t *testing.T) {
	for _, promote := range []bool{false, true} {
		t.Run(fmt.Sprintf("promote=%v", promote), func(t *testing.T) {
			x := open(t, Options{Promote: promote, Reserve: 1 << 17}, 1<<18)
			l := storetest.NewLife(x.s, 11)
			all := storetest.OnAlloc | storetest.OnRead | storetest.OnWrite
			for round := range 64 {
				tier := []*storetest.Faulty{x.fast, x.slow}[round%2]
				fault := []storetest.Fault{
					{Label: "EIO", Err: unix.EIO},
					{Label: "ENOSPC", Err: fmt.Errorf("%w: %w", store.ErrNoSpace, unix.ENOSPC)},
					{Label: "short", IsShort: true, Short: 3},
					{Label: "delay", Delay: 200 * time.Microsecond},
				}[round/2%4]
				fault.On, fault.Skip, fault.Times = all, round%5, 3
				off := tier.Inject(fault)
				l.Step(30)
				off()
				if err := l.Verify(); err != nil {
					t.Fatalf("round %d, %s: %v", round, fault.Label, err)
				}
			}
			l.Drop()
			eventually(t, "all freed", func() bool { return x.fast.Info().Used+x.slow.Info().Used == 0 })
			if x.s.Stats().Demoted == 0 {
				t.Error("nothing moved")
			}
			t.Logf("%d operations failed; %+v", l.Failed, x.s.Stats())
		})
	}
}

// Both tiers full: what is not stored is reported, and there is room again as soon as something is freed.
func TestBothFull(t *testing.T) {
	fast, err := compressed.New(&compressed.Options{Limit: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	slow, err := file.New(&file.Options{Dir: t.TempDir(), Capacity: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Options{Fast: fast, Slow: slow})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b := make([]byte, store.SlotSize)
	var slots []store.Slot
	fill := func() {
		for refused := 0; refused < 20; {
			slot, _, err := s.Alloc(1, 1)
			if err != nil {
				t.Fatal(err)
			}
			storetest.Fill(b, uint64(slot))
			if _, err := storetest.Do(t, s.Write, slot, b); err != nil {
				if !errors.Is(err, store.ErrNoSpace) {
					t.Fatal(err)
				}
				s.Free(slot, 1)
				refused++
				time.Sleep(2 * time.Millisecond) // while the mover has two copies of something there may be no room
				continue
			}
			slots = append(slots, slot)
		}
	}
	check := func() {
		t.Helper()
		want := make([]byte, store.SlotSize)
		for _, slot := range slots {
			storetest.Fill(want, uint64(slot))
			expect(t, s, slot, want)
		}
	}
	for range 3 {
		fill()
		if len(slots) < 480 {
			t.Fatalf("%d pages fit into 2 MiB", len(slots))
		}
		check()
		for _, slot := range slots[:100] {
			s.Free(slot, 1)
		}
		slots = slots[100:]
		check()
	}
}

// Several goroutines read and replace what moves under them.
func TestMovingUnderReaders(t *testing.T) {
	x := open(t, Options{Promote: true}, 2<<20)
	var stop atomic.Bool
	var wg sync.WaitGroup
	errs := make(chan error, 4)
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			b, got := make([]byte, 256*store.SlotSize), make([]byte, 256*store.SlotSize)
			done := make(chan *store.Op, 1)
			do := func(call func(*store.Op), slot store.Slot, b []byte) error {
				call(&store.Op{Slot: slot, Data: b, Done: func(op *store.Op) { done <- op }})
				return (<-done).Err
			}
			type run struct {
				slot store.Slot
				n    int
				kind storetest.Kind
				seed uint64
			}
			var have []run
			for !stop.Load() {
				slot, n, err := x.s.Alloc(1+rng.IntN(256), 1)
				if err != nil {
					errs <- err
					return
				}
				r := run{slot, n, storetest.Kind(rng.IntN(int(storetest.Kinds))), rng.Uint64()}
				storetest.FillKind(b[:n*store.SlotSize], r.kind, r.seed)
				if err := do(x.s.Write, slot, b[:n*store.SlotSize]); err != nil {
					errs <- err
					return
				}
				have = append(have, r)
				for range 3 {
					k := rng.IntN(len(have))
					r := have[k]
					storetest.FillKind(b[:r.n*store.SlotSize], r.kind, r.seed)
					err := do(x.s.Read, r.slot, got[:r.n*store.SlotSize])
					if err == nil && !bytes.Equal(got[:r.n*store.SlotSize], b[:r.n*store.SlotSize]) {
						err = errors.New("wrong contents")
					}
					if err != nil {
						errs <- fmt.Errorf("%d+%d: %w", r.slot, r.n, err)
						return
					}
					if len(have) > 24 {
						x.s.Free(r.slot, r.n)
						have[k] = have[len(have)-1]
						have = have[:len(have)-1]
					}
				}
			}
			for _, r := range have {
				x.s.Free(r.slot, r.n)
			}
		})
	}
	time.Sleep(2 * time.Second)
	stop.Store(true)
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	eventually(t, "all freed", func() bool { return x.fast.Info().Used+x.slow.Info().Used == 0 })
	st := x.s.Stats()
	t.Logf("%+v", st)
	if st.Demoted == 0 || st.Promoted == 0 {
		t.Errorf("nothing moved: %+v", st)
	}
}

// image is memory that is copied while others change it, word by word, as a killed process leaves it.
func image(t testing.TB, m store.Memory) store.Memory {
	c := anonymous(t)
	if err := c.Grow(int64(len(m.Bytes()))); err != nil {
		t.Fatal(err)
	}
	from, to := m.Words(), c.Words()
	for i := range from {
		if w := from[i].Load(); w != 0 {
			to[i].Store(w)
		}
	}
	return c
}

// The process is killed at any step of the tiers' while contents move, and a new one takes over.
func TestRestartAtEveryStep(t *testing.T) {
	dir := t.TempDir()
	words, index, data, sums := anonymous(t), anonymous(t), anonymous(t), anonymous(t)
	slow, err := file.New(&file.Options{Dir: dir, Sums: sums, Slack: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	fast, err := compressed.New(&compressed.Options{Limit: 256 << 10, Index: index, Data: data})
	if err != nil {
		t.Fatal(err)
	}
	f, g := storetest.NewFaulty(fast), storetest.NewFaulty(slow)
	s, err := New(Options{Fast: f, Slow: g, Words: words, Reserve: 128 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	l := storetest.NewLife(s, 5)
	l.Step(100)
	takeOver := func() {
		// The data and the file are not copied first: their contents are only trusted where the words, copied before, point, and nothing of that is
		// overwritten as long as nothing is freed after. The mover is held at the step.
		w, ix, d, sm := image(t, words), image(t, index), image(t, data), image(t, sums)
		fd, err := unix.Dup(int(slow.File().Fd()))
		if err != nil {
			t.Fatal(err)
		}
		slow2, err := file.New(&file.Options{File: os.NewFile(uintptr(fd), "paging file"), Sums: sm, Slack: 1 << 40})
		if err != nil {
			t.Fatal(err)
		}
		fast2, err := compressed.New(&compressed.Options{Index: ix, Data: d})
		if err != nil {
			t.Fatal(err)
		}
		s2, err := New(Options{Fast: fast2, Slow: slow2, Words: w, Reserve: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer s2.Close()
		if err := s2.Rebuild(l.Used); err != nil {
			t.Fatal(err)
		}
		l.On(s2)
		if err := l.Verify(); err != nil {
			t.Error(err)
		}
		l.On(s)
		if st := s2.Stats(); st.Fast != fast2.Info().Used/store.SlotSize || st.Slow != slow2.Info().Used/store.SlotSize {
			t.Errorf("after the restart: %+v, the tiers have %d and %d bytes used", st, fast2.Info().Used, slow2.Info().Used)
		}
	}
	// The life stands still while the mover takes its steps: it is stopped at each.
	for k := range 40 {
		steps := 0
		stopped, goOn := make(chan struct{}), make(chan struct{})
		var once sync.Once
		hook := func(string) {
			if steps++; steps == k%20+1 {
				once.Do(func() { close(stopped); <-goOn })
			}
		}
		var mu sync.Mutex
		locked := func(name string) { mu.Lock(); defer mu.Unlock(); hook(name) }
		l.Step(25)
		eventually(t, "the mover at rest", func() bool { return len(s.kick) == 0 })
		g.Step(locked)
		s.wake()
		select {
		case <-stopped:
			takeOver()
		case <-time.After(5 * time.Millisecond):
			takeOver()
		}
		g.Step(nil)
		close(goOn)
		if t.Failed() {
			t.Fatalf("step %d", k%20+1)
		}
	}
	if s.Stats().Demoted == 0 {
		t.Error("nothing moved")
	}
}
