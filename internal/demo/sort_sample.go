//go:build linux

package demo

import (
	"context"
	"errors"
	"sync"
	"time"

	"machpager/region"
)

// samplePause is the time between two looks at what is resident.
const samplePause = 10 * time.Millisecond

// sampler asks the pager again and again what is resident as the kernel counts.
type sampler struct {
	pager  *region.Pager // immutable, as the next two
	cancel context.CancelFunc
	ended  chan struct{}

	mu     sync.Mutex
	now    int64 // guarded by mu, as all below; bytes
	most   int64
	budget int64 // the largest that was in force
	n      int
	err    error
}

func startSampler(ctx context.Context, p *region.Pager) *sampler {
	ctx, cancel := context.WithCancel(ctx)
	s := &sampler{pager: p, cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		for s.look(ctx) {
			select {
			case <-ctx.Done():
			case <-time.After(samplePause):
			}
		}
	}()
	return s
}

// look takes one sample. false: it could not.
func (s *sampler) look(ctx context.Context) bool {
	info, err := s.pager.Info(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case ctx.Err() != nil:
	case err != nil:
		s.err = err
	case info.KernelResident < 0:
		s.err = errors.New("the pager does not know what is resident as the kernel counts")
	default:
		s.now, s.most, s.budget = info.KernelResident, max(s.most, info.KernelResident), max(s.budget, info.Budget)
		s.n++
		return true
	}
	return false
}

func (s *sampler) seen() (now, most, budget int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now, s.most, s.budget
}

// stop ends the sampling. Its fields may be read then. Idempotent.
func (s *sampler) stop() {
	s.cancel()
	<-s.ended
}
