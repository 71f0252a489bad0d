package pager

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Objects come and go on all sides, with I/O in flight, while others look at them.
func TestChurn(t *testing.T) {
	for name, open := range map[string]func(testing.TB) store.Store{
		"memory": func(t testing.TB) store.Store { return memoryStore(t, nil) },
		"file":   func(t testing.TB) store.Store { return fileStore(t) },
		"slow": func(t testing.TB) store.Store {
			f := storetest.NewFaulty(memoryStore(t, nil))
			f.Inject(storetest.Fault{Label: "slow", On: storetest.OnRead | storetest.OnWrite, Delay: 100 * time.Microsecond})
			return f
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			p := newPager(t, s)
			var ports sync.Map
			var workers, lookers sync.WaitGroup
			stop := make(chan struct{})
			for range 2 {
				lookers.Go(func() {
					for {
						select {
						case <-stop:
							return
						case <-time.After(50 * time.Microsecond):
						}
						p.Objects()
						p.Info()
						ports.Range(func(port, _ any) bool {
							p.ObjectPages(port.(emm.Port))
							return true
						})
					}
				})
			}
			for w := range 4 {
				workers.Go(func() {
					for v := range 25 {
						churnObject(t, p, &ports, uint64(w*100+v))
					}
				})
			}
			done := make(chan struct{})
			go func() { workers.Wait(); close(stop); lookers.Wait(); close(done) }()
			select {
			case <-done:
			case <-time.After(3 * emmtest.Deadline):
				t.Fatal("objects that come and go hang")
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if used := s.Info().Used; used != 0 {
				t.Errorf("%d bytes leaked", used)
			}
			s.Close()
		})
	}
}

func churnObject(t *testing.T, p *Pager, ports *sync.Map, seed uint64) {
	port := emm.NewPort()
	ports.Store(port, true)
	defer ports.Delete(port)
	k := emmtest.NewKernel(t, p, port, ps)
	kr := emm.Success
	if seed%2 == 0 {
		kr = k.Create(emm.NewPort(), 64*ps)
	} else if err := p.ObjectCreate(port, 64*ps, ps); err != nil {
		t.Error(err)
	} else {
		kr = k.Init()
	}
	if kr != emm.Success {
		t.Errorf("begin of object: %v", kr)
		return
	}
	k.Write(0, emmtest.Fill(32, ps, seed))
	k.Read(run(0, 40))
	var loans []*emmtest.Loan
	for i := range int64(4) {
		loans = append(loans, k.Give(i*8*ps, emmtest.Fill(4, ps, seed+1), false))
		k.Ask(run(i*8+4, 4), -1)
	}
	if seed%3 == 0 {
		p.NoSenders(port)
	}
	k.Terminate()
	p.NoSenders(port)
	for _, l := range loans {
		l.Wait()
	}
	k.Check()
}

// Close in the middle of everything ends it all.
func TestCloseWithIOInFlight(t *testing.T) {
	f := storetest.NewFaulty(memoryStore(t, nil))
	f.Inject(storetest.Fault{Label: "slow", On: storetest.OnRead | storetest.OnWrite, Delay: 5 * time.Millisecond})
	p := newPager(t, f)
	var loans []*emmtest.Loan
	var kernels []*emmtest.Kernel
	for i := range 10 {
		port := emm.NewPort()
		if err := p.ObjectCreate(port, 64*ps, ps); err != nil {
			t.Fatal(err)
		}
		k := emmtest.NewKernel(t, p, port, ps)
		k.Unasked, k.MayFail = true, true
		if kr := k.Init(); kr != emm.Success {
			t.Fatal(kr)
		}
		for j := range int64(8) {
			loans = append(loans, k.Give(j%4*ps, emmtest.Fill(1, ps, uint64(i)), false))
			k.Ask(run(j%4, 1), -1)
		}
		kernels = append(kernels, k)
	}
	var closers sync.WaitGroup
	for range 3 {
		closers.Go(func() {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if used := f.Info().Used; used != 0 {
				t.Errorf("%d bytes leaked", used)
			}
		})
	}
	closers.Wait()
	for _, l := range loans {
		l.Wait()
	}
	for i, k := range kernels {
		if kr := k.Ask(run(0, 1), 0).Result; kr.Err() == nil {
			t.Errorf("data request after Close: %v", kr)
		}
		if kr := k.Write(0, emmtest.Fill(1, ps, 1)); kr == emm.Success {
			t.Error("return after Close succeeded")
		}
		if v := fmt.Sprint(k.Violations()); v != "[]" {
			t.Errorf("object %d: %s", i, v)
		}
	}
	f.Close()
}
