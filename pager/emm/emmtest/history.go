package emmtest

import (
	"testing"

	"pgregory.net/rapid"
)

// testRandomHistory sends random messages that a vm could send, and the Kernel compares each answer with the model. rapid prints the seed and shrinks.
func testRandomHistory(t *testing.T, h Harness, pageSize int) {
	rapid.Check(t, func(rt *rapid.T) {
		s := h.New(t)
		defer s.Close()
		k := NewKernel(rt, s.Manager, s.Object(objectPages*int64(pageSize), pageSize), pageSize)
		k.MayFail = s.MayFail
		if kr := k.Init(); kr.Err() != nil {
			rt.Fatalf("Init: %v", kr)
		}
		hist := &history{k: k, volatile: h.Volatile, requests: make(map[int]*Request), loans: make(map[int]*Loan)}
		rt.Repeat(map[string]func(*rapid.T){
			"return":  hist.give,
			"request": hist.ask,
			"wait":    func(*rapid.T) { hist.wait() },
			"again":   hist.again,
		})
		hist.wait()
		k.Read(k.run(0, objectPages))
		k.Check()
	})
}

// history is what is outstanding: a page is in at most one message.
type history struct {
	k        *Kernel
	volatile bool
	requests map[int]*Request // by page
	loans    map[int]*Loan    // by page
	seed     uint64
}

// free draws a run of pages that nothing is outstanding for.
func (h *history) free(t *rapid.T) (page, n int) {
	page = rapid.IntRange(0, objectPages-1).Draw(t, "page")
	n = rapid.IntRange(1, min(24, objectPages-page)).Draw(t, "pages")
	for i := range n {
		p := page + i
		if h.requests[p] != nil && h.requests[p].Done() {
			delete(h.requests, p)
		}
		if h.loans[p] != nil && h.loans[p].Done() {
			delete(h.loans, p)
		}
		if h.requests[p] != nil || h.loans[p] != nil {
			return page, i
		}
	}
	return page, n
}

func (h *history) give(t *rapid.T) {
	page, n := h.free(t)
	if n == 0 {
		return
	}
	h.seed++
	data := Fill(n, h.k.pageSize, h.seed)
	if rapid.IntRange(0, 3).Draw(t, "zeros") == 0 {
		i := int64(rapid.IntRange(0, n-1).Draw(t, "zero page"))
		clear(data[i*h.k.pageSize : (i+1)*h.k.pageSize])
	}
	l := h.k.Give(int64(page)*h.k.pageSize, data, false)
	for i := range n {
		h.loans[page+i] = l
	}
}

func (h *history) ask(t *rapid.T) {
	page, n := h.free(t)
	if n == 0 {
		return
	}
	need := int64(page+rapid.IntRange(0, n-1).Draw(t, "need")) * h.k.pageSize
	r := h.k.Ask(h.k.run(page, n), need)
	for i := range n {
		h.requests[page+i] = r
	}
}

func (h *history) wait() {
	h.k.tb.Helper()
	for p, r := range h.requests {
		r.Wait()
		delete(h.requests, p)
	}
	for p, l := range h.loans {
		l.Wait()
		delete(h.loans, p)
	}
}

// again ends the vm's use of the object, and begins anew.
func (h *history) again(t *rapid.T) {
	if rapid.IntRange(0, 7).Draw(t, "terminate") > 0 {
		return
	}
	h.wait()
	h.k.Terminate()
	if h.volatile {
		h.k.Forget()
	}
	if kr := h.k.Init(); kr.Err() != nil {
		t.Fatalf("Init after Terminate: %v", kr)
	}
}
