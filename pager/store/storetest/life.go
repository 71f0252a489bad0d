package storetest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/store"
)

func init() {
	Tests["Kinds"] = testKinds
	Tests["Discard"] = testDiscard
	Tests["FillEmptyFill"] = testFillEmptyFill
	Tests["FaultAtEveryCall"] = testFaultAtEveryCall
}

// Kind is a kind of contents. Stores that compress treat them differently.
type Kind int

// The kinds, from easy to hard.
const (
	Zeros  Kind = iota
	Sparse      // a word in zeros
	Text        // compresses to about a half
	Mixed       // half text, half random
	Random
	Kinds // how many there are
)

func (k Kind) String() string {
	return [...]string{"zeros", "sparse", "text", "mixed", "random"}[k]
}

var words = strings.Fields(`the kernel returns a page to its manager which writes it into paging space and answers when contents are stored there
	so that no thread ever sees anything else than what was written last func err nil != return if for range store slot op Data fmt Errorf`)

// text is words in random order.
var text = func() (b []byte) {
	rng := rand.New(rand.NewPCG(7, 7))
	for len(b) < 1<<18 {
		b = append(append(b, words[rng.IntN(len(words))]...), " \n\t,"[rng.IntN(4)])
	}
	return b
}()

// soak is for how long tests go on that are short otherwise: MACHPAGER_SOAK, a duration. 0: they are short.
var soak, _ = time.ParseDuration(os.Getenv("MACHPAGER_SOAK"))

// FillKind makes contents of one kind, different for each seed but for zeros.
func FillKind(b []byte, k Kind, seed uint64) {
	clear(b)
	for ; len(b) > 0; b = b[min(store.SlotSize, len(b)):] {
		page := b[:min(store.SlotSize, len(b))]
		rng := rand.New(rand.NewPCG(seed, uint64(len(b))))
		switch k {
		case Sparse:
			page[rng.IntN(len(page))] = byte(seed) | 1
		case Text, Mixed:
			n := len(page)
			if k == Mixed {
				n /= 2
				Fill(page[n:], rng.Uint64())
			}
			at := rng.IntN(len(text) - n)
			copy(page[:n], text[at:at+n])
			for i := 0; i+8 <= n; i += 512 { // no page is another's
				binary.LittleEndian.PutUint64(page[i:], rng.Uint64())
			}
		case Random:
			Fill(page, rng.Uint64())
		}
	}
}

// Contents of every kind, in runs of many sizes, side by side.
func testKinds(t *testing.T, h Harness) {
	s := h.open(t, 0)
	type run struct {
		slot store.Slot
		want []byte
	}
	var runs []run
	for k := range Kinds {
		for _, n := range []int{1, 2, 7, 64, 512} {
			slot, m := alloc(t, s, n, 1)
			want := make([]byte, m*store.SlotSize)
			FillKind(want, k, uint64(n))
			write(t, s, slot, want)
			runs = append(runs, run{slot, want})
		}
	}
	all, m := alloc(t, s, int(4*Kinds), 1) // kinds change from slot to slot
	want := make([]byte, m*store.SlotSize)
	for i := range m {
		FillKind(want[i*store.SlotSize:(i+1)*store.SlotSize], Kind(i)%Kinds, uint64(i))
	}
	write(t, s, all, want)
	for _, r := range append(runs, run{all, want}) {
		expect(t, s, r.slot, r.want)
		if n := len(r.want) / store.SlotSize; n > 1 {
			expect(t, s, r.slot+store.Slot(n/3), r.want[n/3*store.SlotSize:])
		}
	}
}

// What is discarded is free at once, in parts of what was allocated, and its neighbours stay as they are.
func testDiscard(t *testing.T, h Harness) {
	const n = 64
	s := h.open(t, n*store.SlotSize)
	slot, m := alloc(t, s, n, n)
	want := contents(m, 1)
	write(t, s, slot, want)
	used := n
	for i := 0; i < n; i += 8 {
		s.Free(slot+store.Slot(i), 3)
		used -= 3
		if got := s.Info(); got.Used != int64(used)*store.SlotSize || got.Used+got.Free != got.Total {
			t.Fatalf("info with %d slots used: %+v", used, got)
		}
	}
	for i := 0; i < n; i += 8 {
		expect(t, s, slot+store.Slot(i+3), want[(i+3)*store.SlotSize:(i+8)*store.SlotSize])
	}
	next, m := alloc(t, s, 3, 3)
	write(t, s, next, contents(m, 9))
	for i := 0; i < n; i += 8 {
		expect(t, s, slot+store.Slot(i+3), want[(i+3)*store.SlotSize:(i+8)*store.SlotSize])
	}
}

// Filling and emptying for a while leaks nothing: the last round has the room of the first.
func testFillEmptyFill(t *testing.T, h Harness) {
	const capacity = 1024
	s := h.open(t, capacity*store.SlotSize)
	rng := rand.New(rand.NewPCG(3, 3))
	b := make([]byte, 64*store.SlotSize)
	type run struct {
		slot store.Slot
		n    int
	}
	rounds := 0
	for end := time.Now().Add(soak); rounds < 5 || time.Now().Before(end); rounds++ {
		var have []run
		total := 0
		for total < capacity {
			slot, m, err := s.Alloc(1+rng.IntN(64), 1)
			if err != nil {
				t.Fatalf("round %d: alloc with %d of %d used: %v", rounds, total, capacity, err)
			}
			FillKind(b[:m*store.SlotSize], Kind(rng.IntN(int(Kinds))), rng.Uint64())
			write(t, s, slot, b[:m*store.SlotSize])
			have, total = append(have, run{slot, m}), total+m
		}
		if i := s.Info(); i.Free != 0 || i.Used != i.Total {
			t.Fatalf("round %d: info of a full store: %+v", rounds, i)
		}
		if _, _, err := s.Alloc(1, 1); !errors.Is(err, store.ErrNoSpace) {
			t.Fatalf("round %d: alloc in a full store: %v", rounds, err)
		}
		rng.Shuffle(len(have), func(i, j int) { have[i], have[j] = have[j], have[i] })
		for _, r := range have {
			s.Free(r.slot, r.n)
		}
		if i := s.Info(); i.Used != 0 || i.Free != capacity*store.SlotSize {
			t.Fatalf("round %d: info of an emptied store: %+v", rounds, i)
		}
	}
}

// Each call fails once, in each way: what was stored before is still there, and what failed has failed as a whole.
func testFaultAtEveryCall(t *testing.T, h Harness) {
	for label, fault := range map[string]Fault{
		"EIO":     {Err: unix.EIO},
		"ENOSPC":  {Err: fmt.Errorf("%w: %w", store.ErrNoSpace, unix.ENOSPC)},
		"short":   {IsShort: true, Short: 1},
		"corrupt": {Corrupt: true, Short: 1, On: OnRead | OnView},
		"delay":   {Delay: time.Millisecond},
	} {
		f := NewFaulty(h.open(t, 0))
		l := NewLife(f, 7)
		for k, end := 0, time.Now().Add(soak/5); k < 30 || time.Now().Before(end); k += 3 {
			fault := fault
			if fault.Label, fault.Skip, fault.Times = label, k%31, 1; fault.On == 0 {
				fault.On = OnAlloc | OnRead | OnWrite | OnView
			}
			off := f.Inject(fault)
			l.Step(20)
			off()
			if err := l.Verify(); err != nil {
				t.Fatalf("%s at call %d: %v", label, k%31, err)
			}
		}
		if f.Hits(label) == 0 {
			t.Errorf("%s: never struck", label)
		}
		l.Drop()
		if i := f.Info(); i.Used != 0 {
			t.Errorf("%s: %d bytes leaked", label, i.Used)
		}
	}
}

// Life uses a store in a manager's way: new contents into new slots; the old ones are freed when those are stored, and kept when that failed.
// It is for one goroutine.
type Life struct {
	s      store.Store
	rng    *rand.Rand
	pages  map[int]*lived
	done   chan *store.Op
	Failed int // operations that failed
}

type lived struct {
	slot store.Slot
	kind Kind
	seed uint64
}

// NewLife makes a Life of 128 pages.
func NewLife(s store.Store, seed uint64) *Life {
	return &Life{s: s, rng: rand.New(rand.NewPCG(seed, 17)), pages: make(map[int]*lived), done: make(chan *store.Op, 1)}
}

func (l *Life) do(call func(*store.Op), slot store.Slot, data []byte) *store.Op {
	call(&store.Op{Slot: slot, Data: data, Done: func(op *store.Op) { l.done <- op }})
	select {
	case op := <-l.done:
		return op
	case <-time.After(Deadline):
		panic(fmt.Sprintf("operation on slot %d: not done after %v", slot, Deadline))
	}
}

// Step does n things: writes a run of pages, discards some, or reads one. Failures are counted, and change nothing.
func (l *Life) Step(n int) {
	for range n {
		switch first := l.rng.IntN(112); l.rng.IntN(8) {
		default:
			l.write(first, 1+l.rng.IntN(16))
		case 0:
			for i := first; i < first+4; i++ {
				if p := l.pages[i]; p != nil {
					l.s.Free(p.slot, 1)
					delete(l.pages, i)
				}
			}
		case 1, 2:
			if p := l.pages[first]; p != nil {
				if op := l.do(l.s.Read, p.slot, make([]byte, store.SlotSize)); op.Err != nil {
					l.Failed++
				}
			}
		}
	}
}

func (l *Life) write(first, n int) {
	slot, n, err := l.s.Alloc(n, 1)
	if err != nil {
		l.Failed++
		return
	}
	b := make([]byte, n*store.SlotSize)
	fresh := make([]lived, n)
	for i := range fresh {
		fresh[i] = lived{slot + store.Slot(i), Kind(l.rng.IntN(int(Kinds))), l.rng.Uint64()}
		FillKind(b[i*store.SlotSize:(i+1)*store.SlotSize], fresh[i].kind, fresh[i].seed)
	}
	if op := l.do(l.s.Write, slot, b); op.Err != nil {
		l.Failed++
		l.s.Free(slot, n)
		return
	}
	for i := range fresh {
		if old := l.pages[first+i]; old != nil {
			l.s.Free(old.slot, 1)
		}
		l.pages[first+i] = &fresh[i]
	}
}

// Verify reads all pages. A read that fails is repeated once; wrong contents are an error, and so is paging space that nobody has.
func (l *Life) Verify() error {
	got, want := make([]byte, store.SlotSize), make([]byte, store.SlotSize)
	for i, p := range l.pages {
		op := l.do(l.s.Read, p.slot, got)
		if op.Err != nil {
			op = l.do(l.s.Read, p.slot, got)
		}
		if op.Err != nil {
			return fmt.Errorf("page %d: %w", i, op.Err)
		}
		if FillKind(want, p.kind, p.seed); !bytes.Equal(got, want) {
			return fmt.Errorf("page %d, slot %d, %v: wrong contents", i, p.slot, p.kind)
		}
	}
	if used := l.s.Info().Used; used != int64(len(l.pages))*store.SlotSize {
		return fmt.Errorf("%d bytes are used for %d pages", used, len(l.pages))
	}
	return nil
}

// Used tells the slots of all pages, for Rebuild.
func (l *Life) Used(yield func(store.Slot, int) bool) {
	for _, p := range l.pages {
		if !yield(p.slot, 1) {
			return
		}
	}
}

// On goes on with another store, which has the slots of the first.
func (l *Life) On(s store.Store) { l.s = s }

// Drop frees all pages.
func (l *Life) Drop() {
	for _, p := range l.pages {
		l.s.Free(p.slot, 1)
	}
	clear(l.pages)
}

// Benchmark measures writing and reading of text, zeros, random and mixed pages in runs of 1 and 512, by one goroutine and by as many as the benchmark has CPUs.
func Benchmark(b *testing.B, open func(b testing.TB) store.Store) {
	for _, k := range []Kind{Zeros, Text, Mixed, Random} {
		for _, n := range []int{1, 512} {
			for _, goroutines := range []int{1, 2} {
				for _, write := range []bool{true, false} {
					what := map[bool]string{true: "write", false: "read"}[write]
					b.Run(fmt.Sprintf("%s/%v/run=%d/goroutines=%d", what, k, n, goroutines), func(b *testing.B) {
						benchmark(b, open(b), k, n, goroutines, write)
					})
				}
			}
		}
	}
}

// benchmark does one page of work for each of b.N.
func benchmark(b *testing.B, s store.Store, k Kind, n, goroutines int, write bool) {
	defer s.Close()
	b.SetBytes(store.SlotSize)
	b.ReportAllocs()
	ready, begin, end := make(chan struct{}), make(chan struct{}), make(chan error)
	for g := range goroutines {
		go func() { end <- work(s, k, n, b.N/goroutines, g, write, ready, begin) }()
	}
	for range goroutines {
		<-ready
	}
	b.ResetTimer()
	start := cpu()
	close(begin)
	for range goroutines {
		if err := <-end; err != nil {
			b.Error(err)
		}
	}
	b.ReportMetric(float64(cpu()-start)/float64(b.N), "cpu-ns/op") // tells more than the clock where others use the machine too
}

// cpu is the CPU time of this process.
func cpu() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func work(s store.Store, k Kind, n, pages, seed int, write bool, ready, begin chan struct{}) (err error) {
	const span = 1024 // slots in use, so that freed ones are used again
	data := make([]byte, span*store.SlotSize)
	FillKind(data, k, uint64(seed))
	done := make(chan struct{}, 1)
	op := &store.Op{Done: func(op *store.Op) { err = op.Err; done <- struct{}{} }}
	do := func(call func(*store.Op), slot store.Slot, b []byte) {
		if err == nil {
			op.Slot, op.Data = slot, b
			call(op)
			<-done
		}
	}
	var slots [span]store.Slot
	for i := 0; i < span && err == nil; i += n {
		var m int
		if slots[i], m, err = s.Alloc(n, n); err == nil && m == n {
			do(s.Write, slots[i], data[i*store.SlotSize:(i+n)*store.SlotSize])
		}
	}
	ready <- struct{}{}
	<-begin
	buf := make([]byte, n*store.SlotSize)
	for p := 0; p < pages && err == nil; p += n {
		i := p % span
		if !write {
			do(s.Read, slots[i], buf)
			continue
		}
		var slot store.Slot
		if slot, _, err = s.Alloc(n, n); err == nil {
			do(s.Write, slot, data[i*store.SlotSize:(i+n)*store.SlotSize])
			s.Free(slots[i], n)
			slots[i] = slot
		}
	}
	return err
}
