package vm

import (
	"math/rand/v2"
	"sync/atomic"
	"unsafe"

	"machpager/pager/emm"
)

// slab is a manager whose pages outlive the process: a memfd, page by page, behind a byte for each page that says that it was stored, and one that says that the object
// was created. It answers at once or from another goroutine.
type slab struct {
	mem       []byte
	ps, n     int64
	temporary bool
}

func (s *slab) flag(p int64) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&s.mem[4*p]))
}

func (s *slab) created() *atomic.Uint32 { return s.flag(s.n) }

func slabHead(n int64) int64 { return (4*(n+1) + 4095) &^ 4095 }

func (s *slab) Init(h emm.Head, _ int) emm.KernReturn {
	return h.Control.ChangeAttributes(emm.Attributes{Temporary: s.temporary, ClusterSize: 2 << 20}, false)
}

func (s *slab) Create(h emm.Head, _ emm.Port, _ int64, _ int) emm.KernReturn {
	s.created().Store(1)
	return s.Init(h, 0)
}

func (s *slab) DataRequest(h emm.Head, want emm.Run, _ int64, _ emm.Prot) emm.KernReturn {
	answer := func() {
		for off := want.Off; off < want.End(); {
			p, end := off/s.ps, off/s.ps+1
			had := s.flag(p).Load()
			for end*s.ps < want.End() && s.flag(end).Load() == had {
				end++
			}
			if had == 0 {
				h.Control.DataUnavailable(emm.Run{Off: off, Size: (end - p) * s.ps})
			} else {
				h.Control.DataSupply(off, s.mem[slabHead(s.n)+off:][:(end-p)*s.ps], emm.ProtNone, false, false)
			}
			off = end * s.ps
		}
	}
	if rand.IntN(2) == 0 {
		answer()
	} else {
		go answer()
	}
	return emm.Success
}

func (s *slab) DataReturn(h emm.Head, off int64, data []byte, _, _ bool) emm.KernReturn {
	store := func() {
		zero := true
		for _, b := range data {
			if b != 0 {
				zero = false
				break
			}
		}
		copy(s.mem[slabHead(s.n)+off:], data)
		for p := off / s.ps; p < (off+int64(len(data)))/s.ps; p++ {
			if zero {
				s.flag(p).Store(0)
			} else {
				s.flag(p).Store(1)
			}
		}
		h.Control.ReturnCompleted(emm.Run{Off: off, Size: int64(len(data))}, emm.Success)
	}
	if rand.IntN(2) == 0 {
		store()
	} else {
		go store()
	}
	return emm.Success
}

func (s *slab) DataInitialize(h emm.Head, off int64, data []byte) emm.KernReturn {
	return s.DataReturn(h, off, data, true, false)
}

func (s *slab) Terminate(emm.Head) emm.KernReturn { return emm.Success }
