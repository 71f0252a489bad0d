package vm

import "math"

// sparse is a Table that knows where it was never written: nobody need look there, and looking would cost memory.
type sparse interface {
	// NextData is the first range of bytes at or behind off that may be other than zeros; start == end: there is none.
	NextData(off int64) (start, end int64)
}

// touched steps through the pages of an object whose words may be other than zero. A task can make an object of 64 TiB for nothing, and ask for something to be
// done with all of it.
type touched struct {
	o   *Object
	end int64 // what was known at the last look: no hole before it; page
}

// next is the first page in [p, b) whose word may be other than zero, b if there is none.
func (w *touched) next(p, b int64) int64 {
	if p < w.end || p >= b {
		return p
	}
	t, ok := w.o.table.(sparse)
	if !ok {
		w.end = math.MaxInt64
		return p
	}
	start, end := t.NextData(p * 8 &^ (frameSize - 1))
	if start == end {
		return b
	}
	w.end = end / 8
	return min(b, max(p, start/8))
}
