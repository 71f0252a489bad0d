package emmtest

import (
	"bytes"
	"slices"
	"time"

	"machpager/pager/emm"
)

// SetCookie keeps the manager's cookie.
func (k *Kernel) SetCookie(c any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cookie = c
}

// Cookie gives it back.
func (k *Kernel) Cookie() any {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.cookie
}

// ChangeAttributes makes the object ready.
func (k *Kernel) ChangeAttributes(a emm.Attributes, reply bool) emm.KernReturn {
	k.mu.Lock()
	if !k.alive {
		k.violate("ChangeAttributes outside of Init and Terminate")
		k.mu.Unlock()
		return emm.InvalidArgument
	}
	if c := a.ClusterSize; c != 0 && (c&(c-1) != 0 || c < k.pageSize || c > 2<<20) {
		k.violate("ChangeAttributes: cluster size %d", c)
		k.mu.Unlock()
		return emm.InvalidArgument
	}
	k.attributes, k.ready = a, true
	k.mu.Unlock()
	if c, ok := k.manager.(emm.Completer); ok && reply {
		c.ChangeCompleted(k.message(), emm.FlavorBehavior)
	}
	return emm.Success
}

// Attributes tells what was set.
func (k *Kernel) Attributes() (emm.Attributes, emm.KernReturn) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.attributes, emm.Success
}

// answer takes the answer for a run: of is called for each page that was asked for.
func (k *Kernel) answer(name string, r emm.Run, of func(page int64) Answer) emm.KernReturn {
	if k.Inside != nil {
		defer k.Inside()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	pages := k.pages(r)
	if len(pages) == 0 || r.Off < 0 {
		k.violate("%s %+v: no run of whole pages", name, r)
		return emm.InvalidArgument
	}
	if !k.alive {
		for _, page := range pages {
			if !k.late[page] || time.Since(k.ended) > Grace {
				k.violate("%s of page %d after Terminate", name, page)
				break
			}
			delete(k.late, page)
		}
		return emm.InvalidArgument
	}
	for _, page := range pages {
		q := k.asked[page]
		if q == nil {
			if !k.Unasked {
				k.violate("%s of page %d, which was not asked for, or was answered already", name, page)
			}
			continue
		}
		delete(k.asked, page)
		q.answers[page-q.Run.Off/k.pageSize] = of(page)
		if q.left--; q.left == 0 {
			close(q.done)
		}
	}
	return emm.Success
}

// right reports whether b may be the contents of a page; nil is zeros. Called with mu.
func (k *Kernel) right(page int64, b []byte) bool {
	same := func(x []byte) bool {
		if x == nil || b == nil {
			return allZero(x) && allZero(b)
		}
		return bytes.Equal(x, b)
	}
	return same(k.last[page]) || slices.ContainsFunc(k.perhaps[page], same)
}

// DataSupply takes contents, and compares them.
func (k *Kernel) DataSupply(off int64, data []byte, lock emm.Prot, _, reply bool) emm.KernReturn {
	if lock != emm.ProtNone {
		return emm.InvalidArgument
	}
	run := emm.Run{Off: off, Size: int64(len(data))}
	kr := k.answer("DataSupply", run, func(page int64) Answer {
		b := data[page*k.pageSize-off:][:k.pageSize]
		if !k.right(page, b) {
			k.violate("DataSupply of page %d: not what was returned", page)
		}
		return Answer{Kind: Supplied, Data: slices.Clone(b)}
	})
	if c, ok := k.manager.(emm.Completer); ok && reply && kr == emm.Success {
		c.SupplyCompleted(k.message(), run, emm.Success, 0)
	}
	return kr
}

// DataUnavailable takes zeros.
func (k *Kernel) DataUnavailable(r emm.Run) emm.KernReturn {
	return k.answer("DataUnavailable", r, func(page int64) Answer {
		if !k.right(page, nil) {
			k.violate("DataUnavailable of page %d, which was returned", page)
		}
		return Answer{Kind: Unavailable}
	})
}

// DataError takes an error.
func (k *Kernel) DataError(r emm.Run, reason emm.KernReturn) emm.KernReturn {
	return k.answer("DataError", r, func(page int64) Answer {
		if !k.MayFail {
			k.violate("DataError of page %d: %v", page, reason)
		}
		return Answer{Kind: Failed, Reason: reason}
	})
}

// ReturnCompleted ends a loan.
func (k *Kernel) ReturnCompleted(r emm.Run, result emm.KernReturn) emm.KernReturn {
	if k.Inside != nil {
		defer k.Inside()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range k.loans {
		if l.Run == r {
			k.end(l, result)
			return emm.Success
		}
	}
	k.violate("ReturnCompleted %+v: no such return, or completed already", r)
	return emm.InvalidArgument
}

// LockRequest cleans and flushes nothing: no page is resident here.
func (k *Kernel) LockRequest(r emm.Run, _ emm.Return, _ bool, lock emm.Prot, reply bool) emm.KernReturn {
	if lock != emm.ProtNoChange || len(k.pages(r)) == 0 {
		return emm.InvalidArgument
	}
	if c, ok := k.manager.(emm.Completer); ok && reply {
		go c.LockCompleted(k.message(), r)
	}
	return emm.Success
}

// Destroy ends the object: Terminate follows.
func (k *Kernel) Destroy(emm.KernReturn) emm.KernReturn {
	k.mu.Lock()
	alive := k.alive
	k.mu.Unlock()
	if !alive {
		return emm.InvalidArgument
	}
	go k.Terminate()
	return emm.Success
}
