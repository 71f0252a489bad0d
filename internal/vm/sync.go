package vm

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"machpager/pager/emm"
)

// synchronizations are an object's memory_object_synchronize messages that are out.
type synchronizations struct {
	mu   sync.Mutex
	out  []*synchronization // guarded by mu; oldest first
	gone emm.KernReturn     // guarded by mu: other than Success, the object has ended and nothing will be answered
}

// synchronization is one of them. It stays until it is answered, even if its caller has gone, for the answer must not be taken for that of another one.
type synchronization struct {
	run      emm.Run
	start    time.Time
	done     chan emm.KernReturn // capacity 1
	reported bool                // guarded by synchronizations.mu: its age was logged
}

// Sync hands what is dirty or precious of the bytes [off, off+n) to the manager, which keeps it safe, and returns when it does (vm_msync). The pages stay
// resident. What is written meanwhile may be part of it or not. An error means that some of the contents may not be safe: pages that the
// manager did not take are still dirty. When ctx ends, what was begun goes on.
func (o *Object) Sync(ctx context.Context, off, n int64) error {
	s, err := o.beginSync(ctx, off, n)
	if err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	if s == nil {
		return nil
	}
	// Outside the gate: an object that ends answers for its manager.
	select {
	case kr := <-s.done:
		if kr.Err() != nil {
			return fmt.Errorf("sync: the manager has the contents, but could not make them safe: %w", kr)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("sync: waiting for the manager: %w", ctx.Err())
	}
}

// beginSync returns the pages and sends Synchronize. nil: there is nothing to wait for.
func (o *Object) beginSync(ctx context.Context, off, n int64) (*synchronization, error) {
	if !o.gate.enter() {
		return nil, emm.InvalidObject
	}
	defer o.gate.leave()
	a, b, err := o.pages(off, n)
	if err != nil {
		return nil, err
	}
	if o.control.destroyed.Load() {
		return nil, emm.MemoryFailure
	}
	if err := o.lockRange(ctx, a, b, emm.ReturnAll, false); err != nil {
		return nil, err
	}
	bind := o.binding.Load()
	if bind == nil || a == b {
		return nil, nil // no manager, so nothing was ever written
	}
	m, ok := bind.manager.(emm.Synchronizer)
	if !ok {
		return nil, nil
	}
	s := &synchronization{run: emm.Run{Off: a << o.shift, Size: (b - a) << o.shift}, start: time.Now(), done: make(chan emm.KernReturn, 1)}
	if err := o.syncs.add(ctx, s); err != nil {
		return nil, err
	}
	if kr := m.Synchronize(bind.head(o), s.run, emm.SyncSynchronous); kr.Err() != nil {
		o.syncs.answer(s.run, kr) // it dropped the message: nothing will come
	}
	return s, nil
}

// add waits while the manager has too many to answer.
func (q *synchronizations) add(ctx context.Context, s *synchronization) error {
	for {
		q.mu.Lock()
		if q.gone != emm.Success {
			defer q.mu.Unlock()
			return q.gone
		}
		if len(q.out) < MaxRequests {
			q.out = append(q.out, s)
			q.mu.Unlock()
			return nil
		}
		q.mu.Unlock()
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d earlier ones are unanswered: %w", MaxRequests, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// answer ends the oldest synchronisation of exactly the run. false: there is none.
func (q *synchronizations) answer(r emm.Run, kr emm.KernReturn) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, s := range q.out {
		if s.run == r {
			q.out = slices.Delete(q.out, i, i+1)
			s.done <- kr
			return true
		}
	}
	return false
}

// end answers all with reason, now and later: the object has ended.
func (q *synchronizations) end(reason emm.KernReturn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.gone = reason
	for _, s := range q.out {
		s.done <- reason
	}
	q.out = nil
}

// watchSyncs logs what is unanswered for long.
func (o *Object) watchSyncs() {
	o.syncs.mu.Lock()
	defer o.syncs.mu.Unlock()
	for _, s := range o.syncs.out {
		if age := time.Since(s.start); age > slowAfter && !s.reported {
			s.reported = true
			o.vm.log.Warn("a synchronize is not completed", "object", o.id, "off", s.run.Off, "size", s.run.Size, "age", age)
		}
	}
}

func (c *control) SynchronizeCompleted(r emm.Run) emm.KernReturn {
	return c.synchronized(r, emm.Success)
}

func (c *control) SynchronizeError(r emm.Run, reason emm.KernReturn) emm.KernReturn {
	if reason.Err() == nil {
		reason = emm.Failure
	}
	return c.synchronized(r, reason)
}

func (c *control) synchronized(r emm.Run, kr emm.KernReturn) emm.KernReturn {
	return c.within(r, func(a, b int64) {
		if !c.o.syncs.answer(r, kr) {
			c.o.vm.counters.unasked.Add(b - a)
		}
	})
}
