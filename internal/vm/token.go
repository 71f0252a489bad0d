package vm

import (
	"sync"
	"sync/atomic"
	"time"
)

// One instruction can need several pages at once: a copy from one misaligned address to another, four. Under the smallest budgets the pages that one thread
// needs are the victims of another's fault, and round it goes. So one thread at a time holds a token: the last pages filled or granted for it are no victims. It
// passes on when that thread has had enough for any instruction, or faults no more.
const (
	tokenPages  = 4                    // an instruction needs no more
	tokenFaults = 4 * tokenPages       // served to one holder
	tokenIdle   = 2 * time.Millisecond // without a fault of the holder, none of its being outstanding
	tokenMax    = 10 * time.Second     // whatever happens
	tokenUseful = time.Second          // after the last fault that found no frame, nobody needs a token
)

type token struct {
	until atomic.Int64 // ns since epoch; before it, there is pressure

	mu     sync.Mutex // a leaf
	task   *Task      // guarded by mu, as all below
	tid    uint32
	pages  [tokenPages]tokenPage
	next   int
	served int
	asking bool // the holder waits for a page
	since  time.Time
	last   time.Time
}

type tokenPage struct {
	o *Object
	p int64
}

// pressed says that a fault found no frame.
func (t *token) pressed() { t.until.Store(time.Now().Add(tokenUseful).UnixNano()) }

func (t *token) needed(now time.Time) bool {
	until := t.until.Load()
	return until != 0 && now.UnixNano() < until
}

// asks says that a thread faults; it gets the token if nobody has it any more.
func (t *token) asks(task *Task, tid uint32, now time.Time) {
	if !t.needed(now) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.task == task && t.tid == tid {
		t.asking = true
		return
	}
	idle := !t.asking && (now.Sub(t.last) > tokenIdle || t.served >= tokenFaults)
	if t.task == nil || idle || now.Sub(t.since) > tokenMax {
		t.pages = [tokenPages]tokenPage{}
		t.task, t.tid, t.served, t.asking, t.since, t.last = task, tid, 0, true, now, now
	}
}

// served says that a thread got page p.
func (t *token) got(task *Task, tid uint32, o *Object, p int64) {
	if t.until.Load() == 0 {
		return
	}
	now := time.Now()
	if !t.needed(now) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.task != task || t.tid != tid {
		return
	}
	t.asking, t.last = false, now
	t.served++
	if t.has(o, p) {
		return
	}
	t.pages[t.next] = tokenPage{o, p}
	t.next = (t.next + 1) % tokenPages
}

func (t *token) has(o *Object, p int64) bool {
	for _, x := range t.pages {
		if x.o == o && x.p == p {
			return true
		}
	}
	return false
}

// holds reports whether page p is no victim for the token's sake.
func (t *token) holds(o *Object, p int64) bool {
	if t.until.Load() == 0 {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.task != nil && t.has(o, p) && time.Since(t.last) < tokenMax
}

// held reports whether the thread has the token.
func (t *token) held(task *Task, tid uint32) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.task == task && t.tid == tid && task != nil
}

// drop takes the token from a task that leaves, or forgets the pages of an object that ends.
func (t *token) drop(task *Task, o *Object) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if task != nil && t.task == task {
		t.task = nil
	}
	for i := range t.pages {
		if task != nil && t.task == nil || t.pages[i].o == o {
			t.pages[i] = tokenPage{}
		}
	}
}
