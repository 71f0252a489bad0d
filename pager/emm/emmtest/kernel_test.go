package emmtest

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"machpager/pager/emm"
)

// shelf is the simplest manager that keeps the contract, with a way to break each rule.
type shelf struct {
	mu     sync.Mutex
	size   int64
	pages  map[emm.Port]map[int64][]byte // by object and offset
	seqnos []uint32
	broken string // immutable
	later  sync.WaitGroup
}

func (s *shelf) Init(h emm.Head, pageSize int) emm.KernReturn {
	s.mu.Lock()
	s.seqnos = append(s.seqnos, h.Seqno)
	s.size = int64(pageSize)
	if s.pages[h.Object] == nil {
		s.pages[h.Object] = make(map[int64][]byte)
	}
	s.mu.Unlock()
	h.Control.SetCookie(h.Object)
	return h.Control.ChangeAttributes(emm.Attributes{}, false)
}

func (s *shelf) bad(r emm.Run) bool {
	return r.Off < 0 || r.Size <= 0 || r.Off%s.size != 0 || r.Size%s.size != 0
}

func (s *shelf) DataRequest(h emm.Head, want emm.Run, _ int64, _ emm.Prot) emm.KernReturn {
	s.mu.Lock()
	s.seqnos = append(s.seqnos, h.Seqno)
	if s.bad(want) || h.Control.Cookie() != h.Object {
		s.mu.Unlock()
		return emm.InvalidArgument
	}
	type answer struct {
		off  int64
		data []byte
	}
	var answers []answer
	for off := want.Off; off < want.End(); off += s.size {
		answers = append(answers, answer{off, bytes.Clone(s.pages[h.Object][off])})
	}
	broken := s.broken
	s.mu.Unlock()
	for i, a := range answers {
		r := emm.Run{Off: a.off, Size: s.size}
		switch {
		case broken == "forgets a page" && i == 1:
			continue
		case broken == "fails a page" && i == 1:
			h.Control.DataError(r, emm.MemoryError)
			continue
		case broken == "answers neighbours" && i == 0:
			h.Control.DataUnavailable(emm.Run{Off: want.End() + s.size, Size: s.size})
		case broken == "answers late" && i == 1:
			s.later.Go(func() {
				time.Sleep(3 * Grace)
				h.Control.DataUnavailable(r)
			})
			continue
		case broken == "odd run" && i == 0:
			h.Control.DataUnavailable(emm.Run{Off: a.off + 1, Size: s.size})
		case broken == "wrong byte" && a.data != nil:
			a.data[s.size-1] ^= 1
		case broken == "loses a page" && i == 1:
			a.data = nil
		case broken == "invents" && a.data == nil:
			a.data = bytes.Repeat([]byte{1}, int(s.size))
		}
		if a.data == nil {
			h.Control.DataUnavailable(r)
		} else {
			h.Control.DataSupply(a.off, a.data, emm.ProtNone, false, false)
		}
		if broken == "answers twice" && i == 0 {
			h.Control.DataUnavailable(r)
		}
	}
	return emm.Success
}

func (s *shelf) DataReturn(h emm.Head, off int64, data []byte, _, _ bool) emm.KernReturn {
	r := emm.Run{Off: off, Size: int64(len(data))}
	s.mu.Lock()
	s.seqnos = append(s.seqnos, h.Seqno)
	bad := s.bad(r)
	s.mu.Unlock()
	if bad {
		return emm.InvalidArgument
	}
	result := emm.Success
	switch s.broken {
	case "keeps the loan":
		return emm.Success
	case "changes the loan":
		data[0] ^= 1
	case "ends another run":
		r.Size -= s.size
	case "fails to store":
		result = emm.NoSpace
	case "refuses and completes":
		h.Control.ReturnCompleted(r, emm.Failure)
		return emm.Failure
	}
	s.mu.Lock()
	for i := int64(0); i < int64(len(data)); i += s.size {
		page := data[i : i+s.size]
		if s.broken != "uses the loan later" {
			page = bytes.Clone(page)
		}
		s.pages[h.Object][off+i] = page
	}
	s.mu.Unlock()
	h.Control.ReturnCompleted(r, result)
	if s.broken == "completes twice" {
		h.Control.ReturnCompleted(r, result)
	}
	return emm.Success
}

func (s *shelf) Synchronize(h emm.Head, r emm.Run, _ emm.SyncFlags) emm.KernReturn {
	s.mu.Lock()
	s.seqnos = append(s.seqnos, h.Seqno)
	bad := s.bad(r)
	s.mu.Unlock()
	if bad {
		return emm.InvalidArgument
	}
	switch s.broken {
	case "never synchronises":
		return emm.Success
	case "synchronises twice":
		h.Control.SynchronizeCompleted(r)
	case "synchronises another run":
		r.Size /= 2
	case "fails to synchronise":
		return h.Control.SynchronizeError(r, emm.MemoryError)
	}
	s.later.Go(func() { h.Control.SynchronizeCompleted(r) })
	return emm.Success
}

func (s *shelf) Terminate(h emm.Head) emm.KernReturn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seqnos = append(s.seqnos, h.Seqno)
	h.Control.SetCookie(nil)
	return emm.Success
}

func newShelf(broken string) *shelf {
	return &shelf{pages: make(map[emm.Port]map[int64][]byte), broken: broken}
}

func TestSuiteOnShelf(t *testing.T) {
	Run(t, Harness{New: func(testing.TB) System {
		return System{Manager: newShelf(""), Object: func(int64, int) emm.Port { return emm.NewPort() }, Close: func() {}}
	}})
}

// quietly takes a test's failures.
type quietly struct{ errors []string }

func (*quietly) Helper() {}
func (q *quietly) Errorf(f string, a ...any) {
	q.errors = append(q.errors, fmt.Sprintf(f, a...))
}
func (q *quietly) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }

// The Kernel sees each broken rule.
func TestKernelSeesBrokenRules(t *testing.T) {
	for broken, want := range map[string]string{
		"":                      "",
		"answers twice":         "answered already",
		"forgets a page":        "never answered",
		"fails a page":          "DataError",
		"answers neighbours":    "not asked for",
		"answers late":          "after Terminate",
		"odd run":               "no run of whole pages",
		"wrong byte":            "not what was returned",
		"loses a page":          "which was returned",
		"invents":               "not what was returned",
		"keeps the loan":        "never answered",
		"changes the loan":      "changed the data",
		"uses the loan later":   "not what was returned",
		"ends another run":      "no such return",
		"fails to store":        "failed",
		"refuses and completes": "refused",
		"completes twice":       "completed already",

		"never synchronises":       "1 synchronizes were never",
		"synchronises twice":       "answered already",
		"synchronises another run": "there is none",
		"fails to synchronise":     "KERN_MEMORY_ERROR",
	} {
		q, m := &quietly{}, newShelf(broken)
		k := NewKernel(q, m, emm.NewPort(), 4096)
		if kr := k.Init(); kr != emm.Success {
			t.Fatal(kr)
		}
		k.Give(0, Fill(4, 4096, 1), false)
		k.Synchronize(k.run(0, 4))
		k.Ask(k.run(0, 6), 0)
		if broken == "answers late" {
			k.Terminate()
		}
		m.later.Wait()
		k.Check()
		got := strings.Join(q.errors, "\n")
		if (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("a manager that %s: want %q, got:\n%s", broken, want, got)
		}
	}
}

// Messages to one port are numbered in order, anew after each Init.
func TestSeqnos(t *testing.T) {
	m := newShelf("")
	k := NewKernel(t, m, emm.NewPort(), 4096)
	for range 2 {
		k.Init()
		k.Write(0, Fill(2, 4096, 1))
		k.Read(k.run(0, 4))
		k.Terminate()
	}
	if want := []uint32{0, 1, 2, 3, 0, 1, 2, 3}; !slices.Equal(m.seqnos, want) {
		t.Errorf("seqnos %v, want %v", m.seqnos, want)
	}
	k.Check()
}
