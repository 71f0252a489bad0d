package emmtest

import (
	"testing"
	"time"

	"machpager/pager/emm"
)

// Sync is one Synchronize.
type Sync struct {
	Run emm.Run

	k      *Kernel
	result emm.KernReturn
	done   chan struct{}
}

// Synchronize sends a Synchronize. The manager must be an emm.Synchronizer.
func (k *Kernel) Synchronize(r emm.Run) *Sync {
	s := &Sync{Run: r, k: k, done: make(chan struct{})}
	k.mu.Lock()
	k.syncs = append(k.syncs, s)
	h := k.head()
	k.mu.Unlock()
	if kr := k.manager.(emm.Synchronizer).Synchronize(h, r, emm.SyncSynchronous); kr.Err() != nil {
		k.synchronized(r, kr) // dropped: nothing comes
	}
	return s
}

// Wait waits for the answer: Success, or why not.
func (s *Sync) Wait() emm.KernReturn {
	s.k.tb.Helper()
	select {
	case <-s.done:
	case <-time.After(Deadline):
		s.k.tb.Fatalf("synchronize %+v: not answered after %v", s.Run, Deadline)
	}
	return s.result
}

// SynchronizeCompleted ends a Synchronize well.
func (k *Kernel) SynchronizeCompleted(r emm.Run) emm.KernReturn {
	return k.synchronized(r, emm.Success)
}

// SynchronizeError ends it otherwise.
func (k *Kernel) SynchronizeError(r emm.Run, reason emm.KernReturn) emm.KernReturn {
	if reason.Err() == nil {
		k.mu.Lock()
		k.violate("SynchronizeError of %+v with %v", r, reason)
		k.mu.Unlock()
	}
	return k.synchronized(r, reason)
}

func (k *Kernel) synchronized(r emm.Run, kr emm.KernReturn) emm.KernReturn {
	if k.Inside != nil {
		defer k.Inside()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, s := range k.syncs {
		if s.Run == r {
			k.syncs = append(k.syncs[:i:i], k.syncs[i+1:]...)
			if kr.Err() != nil && !k.MayFail && k.alive {
				k.violate("synchronize of %+v failed: %v", r, kr)
			}
			s.result = kr
			close(s.done)
			return emm.Success
		}
	}
	k.violate("answer to a synchronize of %+v: there is none, or it was answered already", r)
	return emm.InvalidArgument
}

// A manager that synchronises answers each Synchronize once, with its run, and only after what was returned before it.
func testSynchronize(t *testing.T, h Harness, pageSize int) {
	s, k := start(t, h, pageSize)
	if _, ok := s.Manager.(emm.Synchronizer); !ok {
		return
	}
	k.Synchronize(k.run(0, objectPages)).Wait() // nothing was ever written
	for v := range uint64(5) {
		k.write(int(v), 8, v)
		k.Synchronize(k.run(int(v), 8)).Wait()
		k.Read(k.run(0, objectPages))
	}
	var syncs []*Sync
	for v := range 16 { // many at once, some of them alike
		k.write(v, 1, uint64(v))
		syncs = append(syncs, k.Synchronize(k.run(v&^1, 1)), k.Synchronize(k.run(0, objectPages)))
	}
	for _, s := range syncs {
		s.Wait()
	}
	for _, r := range []emm.Run{{Off: 1, Size: int64(pageSize)}, {Off: -int64(pageSize), Size: int64(pageSize)}, {Off: 0, Size: 0}} {
		k.mu.Lock()
		k.MayFail = true
		k.mu.Unlock()
		k.Synchronize(r).Wait()
	}
}
