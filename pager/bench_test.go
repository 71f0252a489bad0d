package pager

import (
	"fmt"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
)

// sink is a control that takes everything and remembers nothing.
type sink struct {
	*emmtest.Kernel
	cookie   any
	bytes    int64
	returned emm.KernReturn
}

func (s *sink) SetCookie(c any) { s.cookie = c }
func (s *sink) Cookie() any     { return s.cookie }
func (s *sink) ChangeAttributes(emm.Attributes, bool) emm.KernReturn {
	return emm.Success
}
func (s *sink) DataSupply(_ int64, data []byte, _ emm.Prot, _, _ bool) emm.KernReturn {
	s.bytes += int64(len(data))
	return emm.Success
}
func (s *sink) DataUnavailable(r emm.Run) emm.KernReturn {
	s.bytes += r.Size
	return emm.Success
}
func (s *sink) DataError(emm.Run, emm.KernReturn) emm.KernReturn {
	panic("DataError")
}
func (s *sink) ReturnCompleted(_ emm.Run, result emm.KernReturn) emm.KernReturn {
	s.returned = result
	return emm.Success
}

// sinkObject makes an object whose first pages are stored in one run, or scattered.
func sinkObject(t testing.TB, pages int64, scattered bool) (*Pager, emm.Head, *sink) {
	t.Helper()
	p := newPager(t, memoryStore(t, nil))
	port, s := emm.NewPort(), &sink{}
	if err := p.ObjectCreate(port, 1<<30, ps); err != nil {
		t.Fatal(err)
	}
	h := emm.Head{Object: port, Control: s}
	if kr := p.Init(h, ps); kr != emm.Success {
		t.Fatal(kr)
	}
	data := emmtest.Fill(int(pages), ps, 1)
	if scattered {
		for i := pages - 1; i >= 0; i-- {
			p.DataReturn(h, i*ps, data[i*ps:(i+1)*ps], true, false)
		}
	} else {
		p.DataReturn(h, 0, data, true, false)
	}
	if s.returned != emm.Success {
		t.Fatal(s.returned)
	}
	return p, h, s
}

func TestNoAllocation(t *testing.T) {
	if raceEnabled {
		return // the race detector allocates
	}
	for i := range 4 {
		scattered, shared := i&1 != 0, i&2 != 0
		p, h, s := sinkObject(t, 64, scattered)
		if shared {
			if err := p.Snapshot(h.Object, emm.NewPort()); err != nil {
				t.Fatal(err)
			}
		}
		page := emmtest.Fill(1, ps, 2)
		for name, f := range map[string]func(){
			"stored page":        func() { p.DataRequest(h, run(5, 1), 5*ps, emm.ProtRead) },
			"never written page": func() { p.DataRequest(h, run(100, 1), 100*ps, emm.ProtRead) },
			"stored run":         func() { p.DataRequest(h, run(0, 64), 0, emm.ProtRead) },
			"returned page":      func() { p.DataReturn(h, 70*ps, page, true, false) },
		} {
			s.bytes = 0
			if n := testing.AllocsPerRun(200, f); n >= 0.5 { // a collection may empty the pools once
				t.Errorf("%s, scattered %v, shared %v: %v allocations", name, scattered, shared, n)
			}
			if s.bytes == 0 && name != "returned page" {
				t.Errorf("%s: nothing was supplied", name)
			}
		}
	}
}

func perPage(b *testing.B, pages int64) {
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(int64(b.N)*pages), "ns/page")
}

func BenchmarkDataRequest(b *testing.B) {
	for _, c := range []struct {
		name      string
		from, n   int64
		scattered bool
	}{
		{"stored/1", 0, 1, false}, {"stored/16", 0, 16, false}, {"stored/512", 0, 512, false},
		{"scattered/16", 0, 16, true}, {"scattered/512", 0, 512, true},
		{"unwritten/1", 1024, 1, false}, {"unwritten/512", 1024, 512, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			p, h, _ := sinkObject(b, 512, c.scattered)
			b.ReportAllocs()
			for b.Loop() {
				p.DataRequest(h, run(c.from, c.n), c.from*ps, emm.ProtRead)
			}
			perPage(b, c.n)
		})
	}
}

func BenchmarkDataReturn(b *testing.B) {
	for _, n := range []int64{1, 16, 512} {
		for _, zeros := range []bool{false, true} {
			b.Run(fmt.Sprintf("%d/zeros=%v", n, zeros), func(b *testing.B) {
				p, h, s := sinkObject(b, 512, false)
				data := emmtest.Fill(int(n), ps, 3)
				if zeros {
					clear(data)
				}
				b.ReportAllocs()
				for b.Loop() {
					p.DataReturn(h, 0, data, true, false)
				}
				if s.returned != emm.Success {
					b.Fatal(s.returned)
				}
				perPage(b, n)
			})
		}
	}
}

func BenchmarkFileDataRequest(b *testing.B) {
	for _, n := range []int64{1, 16, 512} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p := newPager(b, fileStore(b))
			port := emm.NewPort()
			if err := p.ObjectCreate(port, 1<<30, ps); err != nil {
				b.Fatal(err)
			}
			k := &waiting{done: make(chan struct{}, 1)}
			h := emm.Head{Object: port, Control: k}
			if kr := p.Init(h, ps); kr != emm.Success {
				b.Fatal(kr)
			}
			p.DataReturn(h, 0, emmtest.Fill(512, ps, 1), true, false)
			<-k.done
			b.ReportAllocs()
			for b.Loop() {
				p.DataRequest(h, run(0, n), 0, emm.ProtRead)
				<-k.done
			}
			perPage(b, n)
		})
	}
}

// waiting is a sink that tells when one answer is there.
type waiting struct {
	sink
	done chan struct{}
}

func (w *waiting) DataSupply(int64, []byte, emm.Prot, bool, bool) emm.KernReturn {
	w.done <- struct{}{}
	return emm.Success
}

func (w *waiting) ReturnCompleted(emm.Run, emm.KernReturn) emm.KernReturn {
	w.done <- struct{}{}
	return emm.Success
}

// BenchmarkSnapshot is of 1 GiB in pages of 4 KiB, with the end of the snapshot.
func BenchmarkSnapshot(b *testing.B) {
	const pages = 1 << 18
	p := newPager(b, memoryStore(b, nil))
	port, s := emm.NewPort(), &sink{}
	if err := p.ObjectCreate(port, pages*ps, ps); err != nil {
		b.Fatal(err)
	}
	h := emm.Head{Object: port, Control: s}
	if kr := p.Init(h, ps); kr != emm.Success {
		b.Fatal(kr)
	}
	data := emmtest.Fill(512, ps, 1)
	for i := int64(0); i < pages; i += 512 {
		p.DataReturn(h, i*ps, data, true, false)
	}
	var longest time.Duration
	for b.Loop() {
		c := emm.NewPort()
		start := time.Now()
		if err := p.Snapshot(port, c); err != nil {
			b.Fatal(err)
		}
		longest = max(longest, time.Since(start))
		p.NoSenders(c)
		for p.shares.count() > 0 {
			time.Sleep(100 * time.Microsecond)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/pages, "ns/page")
	b.ReportMetric(float64(longest.Nanoseconds())/pages, "longest-ns/page")
}
