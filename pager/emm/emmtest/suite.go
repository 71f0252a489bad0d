package emmtest

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"machpager/pager/emm"
)

// System is a manager under test.
type System struct {
	Manager emm.Manager
	// Object makes a new object of the manager's, of so many bytes, all zeros.
	Object func(size int64, pageSize int) emm.Port
	// MayFail says that the manager's store may fail at any moment: DataError and failed returns are in order.
	MayFail bool
	// Close ends the manager and fails the test if anything leaked.
	Close func()
}

// Harness makes managers.
type Harness struct {
	New       func(t testing.TB) System
	PageSizes []int // nil: 4096
	// Volatile says that contents end with Terminate.
	Volatile bool
}

// Tests are the parts of the suite by name. Each is run for each page size.
var Tests = map[string]func(t *testing.T, h Harness, pageSize int){
	"NeverWritten":        testNeverWritten,
	"RoundTrip":           testRoundTrip,
	"Overwrite":           testOverwrite,
	"Zeros":               testZeros,
	"Mixed":               testMixed,
	"InitAgain":           testInitAgain,
	"BadMessages":         testBadMessages,
	"TerminateInProgress": testTerminateInProgress,
	"FromInside":          testFromInside,
	"TwoObjects":          testTwoObjects,
	"Concurrent":          testConcurrent,
	"Temporary":           testTemporary,
	"RandomHistory":       testRandomHistory,
	"Synchronize":         testSynchronize,
}

// Run runs all of the suite.
func Run(t *testing.T, h Harness) {
	sizes := h.PageSizes
	if sizes == nil {
		sizes = []int{4096}
	}
	names := make([]string, 0, len(Tests))
	for name := range Tests {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for _, size := range sizes {
			t.Run(name+"/"+byteSize(size), func(t *testing.T) { Tests[name](t, h, size) })
		}
	}
}

func byteSize(n int) string {
	if n >= 1<<20 {
		return fmt.Sprintf("%dM", n>>20)
	}
	return fmt.Sprintf("%dK", n>>10)
}

const objectPages = 64

// start makes a manager with an object that is attached.
func start(t *testing.T, h Harness, pageSize int) (System, *Kernel) {
	t.Helper()
	s := h.New(t)
	t.Cleanup(s.Close)
	return s, attach(t, s, pageSize)
}

func attach(t *testing.T, s System, pageSize int) *Kernel {
	t.Helper()
	k := NewKernel(t, s.Manager, s.Object(objectPages*int64(pageSize), pageSize), pageSize)
	k.MayFail = s.MayFail
	t.Cleanup(k.Check)
	if kr := k.Init(); kr.Err() != nil {
		t.Fatalf("Init: %v", kr)
	}
	return k
}

// Fill makes contents of pages: every 4096 bytes differ from all others of this seed at both ends, and from those of any other seed everywhere.
func Fill(n int, pageSize int64, seed uint64) []byte {
	const block = 4096
	b := make([]byte, int64(n)*pageSize)
	x := seed*0x9e3779b97f4a7c15 + 0x1234567
	for i := 0; i < block; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	for i := block; i < len(b); i += block {
		copy(b[i:], b[:block])
		binary.LittleEndian.PutUint64(b[i:], x+uint64(i))
		binary.LittleEndian.PutUint64(b[i+block-8:], x-uint64(i))
	}
	return b
}

// run is a run of pages.
func (k *Kernel) run(page, n int) emm.Run {
	return emm.Run{Off: int64(page) * k.pageSize, Size: int64(n) * k.pageSize}
}

func (k *Kernel) write(page, n int, seed uint64) {
	k.Write(int64(page)*k.pageSize, Fill(n, k.pageSize, seed))
}

// kinds fails the test unless all answers are of the kind; where the store may fail, failures are passed over.
func (k *Kernel) kinds(t *testing.T, page, n int, want Kind) {
	t.Helper()
	for i, a := range k.Read(k.run(page, n)) {
		if a.Kind != want && !(k.MayFail && (a.Kind == Failed || want == Supplied)) {
			t.Errorf("page %d: %v, want %v", page+i, a.Kind, want)
		}
	}
}

func testNeverWritten(t *testing.T, h Harness, pageSize int) {
	_, k := start(t, h, pageSize)
	k.Read(k.run(0, 1))
	k.Read(k.run(objectPages-1, 1))
	for _, a := range k.Read(k.run(0, objectPages)) {
		if a.Kind != Unavailable && a.Kind != Supplied && !k.MayFail { // Kernel has checked that what is supplied is zeros
			t.Errorf("never written: %v", a.Kind)
		}
	}
}

func testRoundTrip(t *testing.T, h Harness, pageSize int) {
	_, k := start(t, h, pageSize)
	for seed, r := range [][2]int{{0, 1}, {5, 1}, {objectPages - 1, 1}, {10, 7}, {20, 32}} {
		k.write(r[0], r[1], uint64(seed))
		k.kinds(t, r[0], r[1], Supplied)
		k.kinds(t, r[0]+r[1]/2, 1, Supplied)
	}
	for page := objectPages - 1; page >= 0; page-- {
		k.Read(k.run(page, 1))
	}
	k.Read(k.run(0, objectPages))
}

func testOverwrite(t *testing.T, h Harness, pageSize int) {
	_, k := start(t, h, pageSize)
	rng := rand.New(rand.NewPCG(3, 4))
	for v := range uint64(60) {
		page := rng.IntN(objectPages)
		n := 1 + rng.IntN(min(16, objectPages-page))
		k.write(page, n, v)
		k.kinds(t, page, n, Supplied)
		k.Read(k.run(0, objectPages))
	}
}

// Zeros are contents like any others, whatever the manager makes of them.
func testZeros(t *testing.T, h Harness, pageSize int) {
	_, k := start(t, h, pageSize)
	zeros := make([]byte, 4*pageSize)
	k.Write(0, zeros)
	k.Read(k.run(0, 4))
	k.write(0, 8, 1)
	k.Write(2*int64(pageSize), zeros)
	k.Read(k.run(0, 8))
	almost := make([]byte, 4*pageSize)
	almost[pageSize-1], almost[2*pageSize], almost[3*pageSize+pageSize/2] = 1, 1, 1
	k.Write(4*int64(pageSize), almost)
	k.Read(k.run(0, 8))
	k.write(2, 4, 2)
	k.kinds(t, 2, 4, Supplied)
}

// A request may span pages in any state, stored in any order.
func testMixed(t *testing.T, h Harness, pageSize int) {
	_, k := start(t, h, pageSize)
	for i := 0; i < objectPages; i += 2 {
		k.write(objectPages-1-i, 1, uint64(i))
	}
	k.write(20, 20, 99)
	for i := range objectPages - 8 {
		k.Read(k.run(i, 8))
	}
	r := k.Ask(k.run(0, objectPages), 30*int64(pageSize))
	r.Wait()
	k.Ask(k.run(0, objectPages), -1).Wait()
}

func testInitAgain(t *testing.T, h Harness, pageSize int) {
	_, k := start(t, h, pageSize)
	for v := range uint64(4) {
		k.write(int(v), 10, v)
		if kr := k.Terminate(); kr.Err() != nil {
			t.Errorf("Terminate: %v", kr)
		}
		if h.Volatile {
			k.Forget()
		}
		if kr := k.Init(); kr.Err() != nil {
			t.Fatalf("Init after Terminate: %v", kr)
		}
		k.Read(k.run(0, objectPages))
	}
}

// Messages that make no sense are refused or answered; they hurt nobody.
func testBadMessages(t *testing.T, h Harness, pageSize int) {
	_, k := start(t, h, pageSize)
	k.write(0, 4, 1)
	k.mu.Lock()
	k.MayFail, k.Unasked = true, true
	k.mu.Unlock()
	p := int64(pageSize)
	for _, r := range []emm.Run{{Off: -p, Size: p}, {Off: 1, Size: p}, {Off: 0, Size: p + 1}, {Off: 0, Size: 0}, {Off: 0, Size: -p}, {Off: 1 << 62, Size: p}, {Off: math.MaxInt64 - p + 1, Size: p}} {
		h := emm.Head{Object: k.object, Control: quiet{k}}
		if kr := k.manager.DataRequest(h, r, r.Off, emm.ProtRead); kr.Err() == nil && r.Size != p {
			t.Errorf("DataRequest %+v: %v", r, kr)
		}
	}
	for _, c := range []struct {
		off int64
		n   int
	}{{1, pageSize}, {-p, pageSize}, {0, pageSize - 1}, {0, 0}, {1 << 62, pageSize}} {
		k.Give(c.off, make([]byte, c.n), false).Wait()
	}
	k.Read(k.run(0, 8))
}

// quiet is a control that takes any answer.
type quiet struct{ *Kernel }

func (quiet) DataSupply(int64, []byte, emm.Prot, bool, bool) emm.KernReturn { return emm.Success }
func (quiet) DataUnavailable(emm.Run) emm.KernReturn                        { return emm.Success }
func (quiet) DataError(emm.Run, emm.KernReturn) emm.KernReturn              { return emm.Success }

// Terminate may come at any time. Loans end all the same, and nothing else is answered.
func testTerminateInProgress(t *testing.T, h Harness, pageSize int) {
	s := h.New(t)
	t.Cleanup(s.Close)
	for v := range uint64(20) {
		k := attach(t, s, pageSize)
		k.write(0, 16, v)
		var loans []*Loan
		for i := range 8 {
			k.Ask(k.run(i, 1), -1)
			loans = append(loans, k.Give(int64(20+i*4)*int64(pageSize), Fill(4, int64(pageSize), v), false))
		}
		k.Terminate()
		for _, l := range loans {
			l.Wait()
		}
	}
	time.Sleep(2 * Grace) // what comes now is a violation
}

// The manager is called again from inside its calls of the control: it must hold no lock there.
func testFromInside(t *testing.T, h Harness, pageSize int) {
	s := h.New(t)
	t.Cleanup(s.Close)
	k := NewKernel(t, s.Manager, s.Object(objectPages*int64(pageSize), pageSize), pageSize)
	k.MayFail = s.MayFail
	t.Cleanup(k.Check)
	var mu sync.Mutex
	next := 16
	var again []*Request
	k.Inside = func() {
		mu.Lock()
		page := next
		next++
		mu.Unlock()
		if page < 48 {
			r := k.Ask(k.run(page, 1), int64(page)*k.pageSize)
			mu.Lock()
			again = append(again, r)
			mu.Unlock()
		}
	}
	if kr := k.Init(); kr.Err() != nil {
		t.Fatalf("Init: %v", kr)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.Write(0, Fill(8, k.pageSize, 1))
		k.Read(k.run(0, 8))
	}()
	select {
	case <-done:
	case <-time.After(2 * Deadline):
		t.Fatal("the manager hangs when it is called from inside an answer")
	}
	deadline := time.Now().Add(Deadline)
	for {
		mu.Lock()
		n := len(again)
		mu.Unlock()
		if n >= 32 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of 32 requests from inside answers were made", n)
		}
		time.Sleep(time.Millisecond)
	}
	for _, r := range again {
		r.Wait()
	}
}

func testTwoObjects(t *testing.T, h Harness, pageSize int) {
	s, a := start(t, h, pageSize)
	b := attach(t, s, pageSize)
	for v := range uint64(10) {
		a.write(0, 16, 2*v)
		b.write(8, 16, 2*v+1)
		a.Read(a.run(0, objectPages))
		b.Read(b.run(0, objectPages))
	}
	a.Terminate()
	b.Read(b.run(0, objectPages))
}

func testConcurrent(t *testing.T, h Harness, pageSize int) {
	const workers = 8
	_, k := start(t, h, pageSize)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() { // each has pages of its own, like the page word's owner
			rng := rand.New(rand.NewPCG(uint64(w), 7))
			const n = objectPages / workers
			for v := range uint64(60) {
				first := rng.IntN(n)
				pages := 1 + rng.IntN(n-first)
				if rng.IntN(2) == 0 {
					k.Give(int64(w*n+first)*k.pageSize, Fill(pages, k.pageSize, v<<8|uint64(w)), false).Wait()
				} else {
					k.Ask(k.run(w*n+first, pages), -1).Wait()
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(3 * Deadline):
		t.Fatal("concurrent messages hang")
	}
	k.Read(k.run(0, objectPages))
}

// The default manager takes over temporary objects; other managers are not asked.
func testTemporary(t *testing.T, h Harness, pageSize int) {
	s := h.New(t)
	t.Cleanup(s.Close)
	if _, ok := s.Manager.(emm.DefaultManager); !ok {
		return
	}
	port := emm.NewPort()
	for v := range uint64(3) { // the same port again: nothing of the last object is left
		k := NewKernel(t, s.Manager, port, pageSize)
		k.MayFail = s.MayFail
		if kr := k.Create(emm.NewPort(), 4*int64(pageSize)); kr.Err() != nil {
			t.Fatalf("Create: %v", kr)
		}
		k.Read(k.run(0, 32))
		k.Give(0, Fill(8, k.pageSize, 10+v), true).Wait()
		k.Give(4*k.pageSize, Fill(8, k.pageSize, 20+v), true).Wait() // ignored where there are contents
		k.Read(k.run(0, 32))
		k.write(2, 4, 30+v)
		k.Give(0, Fill(16, k.pageSize, 40+v), true).Wait()
		k.Read(k.run(0, 32)) // beyond the size, which is a hint
		k.Terminate()
		k.Check()
	}
}
