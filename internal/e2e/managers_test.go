package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"machpager/pager/emm"
	"machpager/region/spawn"
)

// managers are this program's own. They run in the pager's process.
func managers() []spawn.Manager {
	return []spawn.Manager{
		{Name: "faulty", Open: func(_ context.Context, arg string, _ *os.File) (emm.Manager, error) { return &faulty{mode: arg}, nil }},
		{Name: "steady", Reopen: true, Open: func(context.Context, string, *os.File) (emm.Manager, error) { return &faulty{mode: modeOK}, nil }},
		{Name: "badstore", Open: openBadStore},
		{Name: "moody", Open: openMoody},
		{Name: "opener", Open: opener},
		{Name: "sluggish", Open: openSluggish},
		{Name: "refuses", Open: func(context.Context, string, *os.File) (emm.Manager, error) {
			return nil, fmt.Errorf("open the manager: %w", os.ErrPermission)
		}},
	}
}

// What a faulty manager does with a data request. modeFile and a path: what the file says at that moment.
const (
	modeOK    = "ok"
	modeError = "error"   // MemoryError
	modeLost  = "failure" // MemoryFailure
	modeSlow  = "slow"    // a second late
	modeStuck = "stuck"   // never
	modeFile  = "file:"
)

// faulty is a manager whose objects contain fill(off, 0) until something else is written.
type faulty struct {
	mode     string
	pageSize int

	mu    sync.Mutex
	pages map[int64][]byte // guarded by mu
}

var _ emm.Manager = (*faulty)(nil)

func (f *faulty) Init(h emm.Head, pageSize int) emm.KernReturn {
	f.pageSize, f.pages = pageSize, map[int64][]byte{}
	return h.Control.ChangeAttributes(emm.Attributes{ClusterSize: 4 * int64(pageSize)}, false)
}

func (f *faulty) DataRequest(h emm.Head, want emm.Run, need int64, access emm.Prot) emm.KernReturn {
	go f.answer(h.Control, want)
	return emm.Success
}

func (f *faulty) answer(c emm.Control, want emm.Run) {
	mode := f.mode
	if path, ok := strings.CutPrefix(mode, modeFile); ok {
		b, err := os.ReadFile(path)
		if err != nil {
			mode = modeError
		}
		mode = string(b)
	}
	switch mode {
	case modeStuck:
		return
	case modeError:
		c.DataError(want, emm.MemoryError)
		return
	case modeLost:
		c.DataError(want, emm.MemoryFailure)
		return
	case modeSlow:
		time.Sleep(time.Second)
	}
	data := make([]byte, want.Size)
	f.mu.Lock()
	for off := want.Off; off < want.End(); off += int64(f.pageSize) {
		to := data[off-want.Off:][:f.pageSize]
		if page := f.pages[off]; page != nil {
			copy(to, page)
		} else {
			fill(to, off, 0)
		}
	}
	f.mu.Unlock()
	c.DataSupply(want.Off, data, emm.ProtNone, false, false)
}

func (f *faulty) DataReturn(h emm.Head, off int64, data []byte, dirty, kernelCopy bool) emm.KernReturn {
	f.mu.Lock()
	for i := 0; i < len(data); i += f.pageSize {
		f.pages[off+int64(i)] = append([]byte(nil), data[i:i+f.pageSize]...)
	}
	f.mu.Unlock()
	return h.Control.ReturnCompleted(emm.Run{Off: off, Size: int64(len(data))}, emm.Success)
}

func (f *faulty) Terminate(emm.Head) emm.KernReturn { return emm.Success }
