// Package emmtest is the conformance suite for memory managers: anything that implements emm.Manager.
//
// [Kernel] plays the vm for one object and holds the manager to the contract: each page asked for is answered exactly once, and right, byte for byte what was
// returned last; the loan of each return ends exactly once, with the run it began with; nothing comes after Terminate. [Run] runs the suite.
package emmtest

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"machpager/pager/emm"
)

// Deadline is how long any answer may take.
const Deadline = 20 * time.Second

// Grace is how long after Terminate an answer that was under way may still come in.
const Grace = 50 * time.Millisecond

// TB is what a Kernel needs of a test. testing.TB and *rapid.T have it.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Kind is how a page was answered.
type Kind uint8

// The answers. None: not yet, or never because the manager refused the request.
const (
	None Kind = iota
	Supplied
	Unavailable
	Failed
)

func (k Kind) String() string { return [...]string{"none", "supplied", "unavailable", "failed"}[k] }

// Answer is the answer for one page.
type Answer struct {
	Kind   Kind
	Data   []byte         // Supplied: a copy
	Reason emm.KernReturn // Failed
}

// Kernel is a vm with one object, for tests. It keeps what the manager has, as it must be: what was last returned successfully. Its methods may be called from
// any goroutine. Like a vm, a test asks for no page that is outstanding or on loan, unless it tests just that.
type Kernel struct {
	// Immutable once used.
	MayFail bool   // DataError and failed returns are no violations
	Unasked bool   // answers for pages nobody asked for are no violations
	Inside  func() // called inside each answer, without locks: may call the manager

	tb       TB
	manager  emm.Manager
	object   emm.Port
	pageSize int64

	mu         sync.Mutex
	cookie     any
	seqno      uint32
	attributes emm.Attributes
	ready      bool
	alive      bool // between Init or Create and Terminate
	ending     bool // in Terminate
	ended      time.Time
	last       map[int64][]byte   // by page; what the manager has
	perhaps    map[int64][][]byte // by page; what it may have: returned, not or not successfully completed
	asked      map[int64]*Request // by page; outstanding
	late       map[int64]bool     // pages outstanding at Terminate
	loans      []*Loan            // outstanding
	syncs      []*Sync            // outstanding
	violations []string
}

var _ emm.Control = (*Kernel)(nil)

// NewKernel makes a vm for the object. Check must be called at the end.
func NewKernel(tb TB, m emm.Manager, object emm.Port, pageSize int) *Kernel {
	return &Kernel{tb: tb, manager: m, object: object, pageSize: int64(pageSize),
		last: make(map[int64][]byte), perhaps: make(map[int64][][]byte), asked: make(map[int64]*Request), late: make(map[int64]bool)}
}

// violate notes a broken rule. Called with mu.
func (k *Kernel) violate(format string, args ...any) {
	if len(k.violations) < 20 {
		k.violations = append(k.violations, fmt.Sprintf(format, args...))
	}
}

// Violations are the rules that were broken so far.
func (k *Kernel) Violations() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.violations)
}

// Check fails the test for each broken rule, and for what is still outstanding.
func (k *Kernel) Check() {
	k.tb.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, v := range k.violations {
		k.tb.Errorf("contract broken: %s", v)
	}
	if len(k.asked) > 0 || len(k.loans) > 0 || len(k.syncs) > 0 {
		k.tb.Errorf("contract broken: %d pages, %d returns and %d synchronizes were never answered", len(k.asked), len(k.loans), len(k.syncs))
	}
}

// head is the head of the next message to the object's port. Called with mu.
func (k *Kernel) head() emm.Head {
	h := emm.Head{Object: k.object, Control: k, Seqno: k.seqno}
	k.seqno++
	return h
}

// message is head, without mu.
func (k *Kernel) message() emm.Head {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.head()
}

// Init sends Init, and expects the object to become ready.
func (k *Kernel) Init() emm.KernReturn {
	k.tb.Helper()
	k.mu.Lock()
	k.alive, k.ready, k.seqno = true, false, 0
	h := k.head()
	k.mu.Unlock()
	kr := k.manager.Init(h, int(k.pageSize))
	if kr.Err() != nil {
		k.mu.Lock()
		k.alive = false
		k.mu.Unlock()
		return kr
	}
	deadline := time.Now().Add(Deadline)
	for kr != emm.Success && !k.isReady() {
		if time.Now().After(deadline) {
			k.tb.Fatalf("object is not ready %v after Init", Deadline)
		}
		time.Sleep(time.Millisecond)
	}
	return kr
}

func (k *Kernel) isReady() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ready
}

// Create hands the object over as a temporary one, to the default pager with this port.
func (k *Kernel) Create(pager emm.Port, size int64) emm.KernReturn {
	k.mu.Lock()
	k.alive, k.ready, k.seqno = true, true, 0
	h := emm.Head{Object: pager, Control: k}
	k.mu.Unlock()
	kr := k.manager.(emm.DefaultManager).Create(h, k.object, size, int(k.pageSize))
	if kr.Err() != nil {
		k.mu.Lock()
		k.alive = false
		k.mu.Unlock()
	}
	return kr
}

// Terminate sends Terminate. What is outstanding is dropped, but for loans.
func (k *Kernel) Terminate() emm.KernReturn {
	k.mu.Lock()
	h := k.head()
	k.ending = true // the object may end inside, and a return with it
	k.mu.Unlock()
	kr := k.manager.Terminate(h)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.alive, k.ending, k.ended = false, false, time.Now()
	clear(k.late)
	for page, r := range k.asked {
		k.late[page] = true
		delete(k.asked, page)
		r.drop()
	}
	k.syncs = nil
	return kr
}

// Forget is the end of the contents: from now on the manager must have zeros.
func (k *Kernel) Forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.last)
	clear(k.perhaps)
}

// Inherit says that the object is made now with the contents of another: a snapshot of it. What is on loan of the other may be in it.
func (k *Kernel) Inherit(from *Kernel) {
	from.mu.Lock()
	last, perhaps := maps.Clone(from.last), make(map[int64][][]byte)
	for page, p := range from.perhaps {
		perhaps[page] = slices.Clone(p)
	}
	from.mu.Unlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.last, k.perhaps = last, perhaps
}

// Request is one DataRequest.
type Request struct {
	Run    emm.Run
	Result emm.KernReturn // of the call; other than Success and MIGNoReply: refused

	k       *Kernel
	answers []Answer // by page; complete when done is closed
	left    int
	done    chan struct{}
}

// Ask sends a DataRequest. need is the offset of the page that is needed, or -1.
func (k *Kernel) Ask(run emm.Run, need int64) *Request {
	r := &Request{Run: run, k: k, done: make(chan struct{})}
	k.mu.Lock()
	if run.Size > 0 && run.Off%k.pageSize == 0 && run.Size%k.pageSize == 0 {
		r.left = int(run.Size / k.pageSize)
		r.answers = make([]Answer, r.left)
		for page := range int64(r.left) {
			k.asked[run.Off/k.pageSize+page] = r
		}
	}
	h := k.head()
	k.mu.Unlock()
	r.Result = k.manager.DataRequest(h, run, need, emm.ProtRead)
	if r.Result.Err() != nil { // dropped: nothing comes
		k.mu.Lock()
		for page, x := range k.asked {
			if x == r {
				delete(k.asked, page)
			}
		}
		r.drop()
		k.mu.Unlock()
	}
	return r
}

// drop ends a request that gets no more answers. Called with Kernel.mu.
func (r *Request) drop() {
	if r.left > 0 {
		r.left = 0
		close(r.done)
	}
}

// Wait waits for all answers.
func (r *Request) Wait() []Answer {
	r.k.tb.Helper()
	if len(r.answers) == 0 {
		return nil
	}
	select {
	case <-r.done:
	case <-time.After(Deadline):
		r.k.tb.Fatalf("data request %+v: not answered after %v", r.Run, Deadline)
	}
	return r.answers
}

// Done reports whether all answers are there.
func (r *Request) Done() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// Read asks for a run and waits for the answers.
func (k *Kernel) Read(run emm.Run) []Answer {
	k.tb.Helper()
	return k.Ask(run, run.Off).Wait()
}

// Loan is one DataReturn or DataInitialize.
type Loan struct {
	Run emm.Run

	k      *Kernel
	data   []byte // lent
	was    []byte // a copy
	init   bool
	result emm.KernReturn
	done   chan struct{}
}

// Give sends a DataReturn of a copy of data, or a DataInitialize.
func (k *Kernel) Give(off int64, data []byte, initialize bool) *Loan {
	l := &Loan{Run: emm.Run{Off: off, Size: int64(len(data))}, k: k, data: slices.Clone(data), was: slices.Clone(data), init: initialize, done: make(chan struct{})}
	k.mu.Lock()
	for i, page := range k.pages(l.Run) {
		p := l.was[int64(i)*k.pageSize:][:k.pageSize]
		if initialize && k.last[page] != nil && !allZero(k.last[page]) {
			continue
		}
		k.perhaps[page] = append(k.perhaps[page], p)
	}
	k.loans = append(k.loans, l)
	h := k.head()
	k.mu.Unlock()
	var kr emm.KernReturn
	if initialize {
		kr = k.manager.(emm.DefaultManager).DataInitialize(h, off, l.data)
	} else {
		kr = k.manager.DataReturn(h, off, l.data, true, false)
	}
	if kr.Err() != nil { // dropped: the loan is over
		k.mu.Lock()
		k.end(l, kr)
		k.mu.Unlock()
	}
	return l
}

// pages are the numbers of a run's pages; none if it is not whole.
func (k *Kernel) pages(r emm.Run) []int64 {
	if r.Off%k.pageSize != 0 || r.Size%k.pageSize != 0 {
		return nil
	}
	pages := make([]int64, r.Size/k.pageSize)
	for i := range pages {
		pages[i] = r.Off/k.pageSize + int64(i)
	}
	return pages
}

// end ends a loan. Called with mu.
func (k *Kernel) end(l *Loan, result emm.KernReturn) {
	i := slices.Index(k.loans, l)
	if i < 0 {
		k.violate("return of %+v was refused (%v) and completed as well", l.Run, result)
		return
	}
	k.loans = slices.Delete(k.loans, i, i+1)
	if !bytes.Equal(l.data, l.was) {
		k.violate("return of %+v: the manager changed the data", l.Run)
	}
	clear(l.data) // who still looks at it sees something else
	if result == emm.Success {
		for i, page := range k.pages(l.Run) {
			if old := k.last[page]; !l.init || old == nil || allZero(old) {
				k.last[page] = l.was[int64(i)*k.pageSize:][:k.pageSize]
				delete(k.perhaps, page)
			}
		}
	} else if !k.MayFail && k.alive && !k.ending {
		k.violate("return of %+v failed: %v", l.Run, result)
	}
	l.result = result
	close(l.done)
}

// Wait waits for the end of the loan and gives its result.
func (l *Loan) Wait() emm.KernReturn {
	l.k.tb.Helper()
	select {
	case <-l.done:
	case <-time.After(Deadline):
		l.k.tb.Fatalf("return of %+v: not completed after %v", l.Run, Deadline)
	}
	return l.result
}

// Done reports whether the loan has ended.
func (l *Loan) Done() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// Write returns data and waits.
func (k *Kernel) Write(off int64, data []byte) emm.KernReturn {
	k.tb.Helper()
	return k.Give(off, data, false).Wait()
}

func allZero(b []byte) bool {
	var zeros [4096]byte
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}
