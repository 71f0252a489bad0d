package daemon

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"

	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/internal/vm"
	"machpager/pager/emm"
)

// wires are what a mapping has wired, for the next pager: a count for each page that is not 0, as runs, and the requests that are counted in it but may not
// have been answered yet.
type wires struct {
	mu     sync.Mutex
	runs   []wireRun // guarded by mu; in order, apart or of different counts
	seqs   []uint32  // guarded by mu
	inside bool      // guarded by mu; the guardian holds something
}

type wireRun struct{ off, size, count int64 }

// addWires counts n more wirings of [off, off+size). What it returns shares nothing with runs.
func addWires(runs []wireRun, off, size, n int64) []wireRun {
	cuts := []int64{off, off + size}
	for _, r := range runs {
		cuts = append(cuts, r.off, r.off+r.size)
	}
	slices.Sort(cuts)
	var out []wireRun
	for i := 1; i < len(cuts); i++ {
		a, b, c := cuts[i-1], cuts[i], int64(0)
		for len(runs) > 0 && runs[0].off+runs[0].size <= a {
			runs = runs[1:]
		}
		if len(runs) > 0 && runs[0].off <= a {
			c = runs[0].count
		}
		if off <= a && a < off+size {
			c += n
		}
		if k := len(out) - 1; a == b || c == 0 {
			continue
		} else if k >= 0 && out[k].off+out[k].size == a && out[k].count == c {
			out[k].size += b - a
		} else {
			out = append(out, wireRun{a, b - a, c})
		}
	}
	return out
}

// encodeWires makes the tail of an ItemWire: the number of requests, the requests, then runs as the bytes between them, their bytes, and their count, all as varints.
func encodeWires(runs []wireRun, seqs []uint32) []byte {
	b := binary.AppendUvarint(nil, uint64(len(seqs)))
	for _, s := range seqs {
		b = binary.AppendUvarint(b, uint64(s))
	}
	at := int64(0)
	for _, r := range runs {
		b = binary.AppendUvarint(b, uint64(r.off-at)>>12)
		b = binary.AppendUvarint(b, uint64(r.size)>>12)
		b = binary.AppendVarint(b, r.count)
		at = r.off + r.size
	}
	return b
}

// decodeWires reads what encodeWires made.
func decodeWires(b []byte) (runs []wireRun, seqs []uint32, err error) {
	bad := func() ([]wireRun, []uint32, error) {
		return nil, nil, fmt.Errorf("read record of wirings: %w", ipc.ErrMalformed)
	}
	n, k := binary.Uvarint(b)
	if k <= 0 || n > uint64(len(b)) {
		return bad()
	}
	b = b[k:]
	for range n {
		s, k := binary.Uvarint(b)
		if k <= 0 || s > 1<<32-1 {
			return bad()
		}
		seqs, b = append(seqs, uint32(s)), b[k:]
	}
	for at := int64(0); len(b) > 0; {
		gap, k := binary.Uvarint(b)
		if k <= 0 || gap > vm.MaxObjectSize>>12 {
			return bad()
		}
		size, k2 := binary.Uvarint(b[k:])
		if k2 <= 0 || size == 0 || size > vm.MaxObjectSize>>12 {
			return bad()
		}
		count, k3 := binary.Varint(b[k+k2:])
		if k3 <= 0 || count == 0 {
			return bad()
		}
		b = b[k+k2+k3:]
		r := wireRun{at + int64(gap)<<12, int64(size) << 12, count}
		if at = r.off + r.size; at > vm.MaxObjectSize {
			return bad()
		}
		runs = append(runs, r)
	}
	return runs, seqs, nil
}

// count counts a Wire (n is 1) or an Unwire (-1) that the vm has made, and has the guardian know; seq is answered when answered is called. A Wire whose record would be too
// long is refused; an Unwire is not: the next pager would have too much wired.
func (m *mapping) count(d *Daemon, off, size, n int64, seq uint32) (answered func(), err error) {
	w := &m.wires
	w.mu.Lock()
	defer w.mu.Unlock()
	runs, seqs := addWires(w.runs, off, size, n), append(slices.Clone(w.seqs), seq)
	tail := encodeWires(runs, seqs)
	switch {
	case len(tail) <= ipc.MaxItemTail:
		if err := d.hold(guardian.Item{Kind: ipc.ItemWire, ID: m.id, Parent: m.id, Tail: tail}); err != nil {
			return nil, err
		}
		w.inside = true
	case n > 0:
		return nil, fmt.Errorf("%d ranges of the mapping are wired, of different counts or apart: %w", len(runs), emm.ResourceShortage)
	}
	w.runs, w.seqs = runs, seqs
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if i := slices.Index(w.seqs, seq); i >= 0 {
			w.seqs = slices.Delete(w.seqs, i, i+1)
		}
	}, nil
}

// counted reports whether the request is counted, and was before the pager before this one died.
func (m *mapping) counted(seq uint32) bool {
	m.wires.mu.Lock()
	defer m.wires.mu.Unlock()
	return slices.Contains(m.wires.seqs, seq)
}

// drop has the guardian forget.
func (w *wires) drop(d *Daemon, id uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.inside {
		d.letGo(ipc.ItemWire, id)
		w.inside = false
	}
}
