package daemon

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/internal/vm"
	"machpager/pager"
)

// CheckReport is what a check of a live pager has found. It travels as JSON.
type CheckReport struct {
	Problems []CheckProblem `json:"problems"`
	More     int            `json:"more_problems"` // that are not listed
	VM       vm.Checked     `json:"vm"`
	Paging   pager.Checked  `json:"paging"`
	Took     time.Duration  `json:"took_ns"`
}

// CheckProblem is a broken invariant.
type CheckProblem struct {
	Where  string `json:"where"`  // "pages": page tables, files and frames; "paging space"; "rights"
	Object int64  `json:"object"` // in the vm, or of the default pager for paging space; -1: of no object
	Off    int64  `json:"off"`    // bytes; -1: nowhere in particular
	What   string `json:"what"`
}

// maxProblems is how many are listed: with a disk that fails there is one for each page.
const maxProblems = 1000

// check checks the invariants, while all goes on.
func (d *Daemon) check(ctx context.Context) (r CheckReport, err error) {
	begin := time.Now()
	r.Problems = []CheckProblem{}
	add := func(p CheckProblem) {
		if len(r.Problems) == maxProblems {
			r.More++
			return
		}
		r.Problems = append(r.Problems, p)
	}
	r.VM, err = d.vm.Check(ctx, func(p vm.Problem) {
		object := int64(p.Object)
		if object == 0 {
			object = -1
		}
		add(CheckProblem{"pages", object, p.Off, p.What})
	})
	if err != nil {
		return r, err
	}
	r.Paging, err = d.pager.Check(ctx, func(p pager.Problem) { add(CheckProblem{"paging space", int64(p.Object), p.Off, p.What}) })
	if err != nil {
		return r, err
	}
	if err := d.checkRights(ctx, add); err != nil {
		return r, err
	}
	r.Took = time.Since(begin)
	return r, nil
}

const (
	rightsLooks = 5
	rightsPause = 5 * time.Millisecond
)

// checkRights looks whether an object has fewer rights than are held to it: it would end while somebody uses it. More are those of requests that are being served.
func (d *Daemon) checkRights(ctx context.Context, add func(CheckProblem)) error {
	var few map[*object][2]int
	for range rightsLooks {
		now := map[*object][2]int{}
		for o, held := range d.held() {
			if n := d.objects.count(o); n < held {
				now[o] = [2]int{n, held}
			}
		}
		if few != nil { // only what is wrong at every look
			for o := range now {
				if _, before := few[o]; !before {
					delete(now, o)
				}
			}
		}
		if few = now; len(few) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rightsPause):
		}
	}
	for o, n := range few {
		add(CheckProblem{"rights", int64(o.vm.ID()), -1, fmt.Sprintf("%d rights are counted, and handles and mappings together are %d: the object would end while it is in use", n[0], n[1])})
	}
	return nil
}

// held is how many handles and mappings there are of each object.
func (d *Daemon) held() map[*object]int {
	n := map[*object]int{}
	for _, s := range d.roster.all() {
		s.mu.Lock()
		for _, o := range s.handles {
			n[o]++
		}
		for _, m := range s.mappings {
			n[m.object]++
		}
		s.mu.Unlock()
	}
	return n
}

func (s *session) check(ctx context.Context) (ipc.Reply, error) {
	if err := s.operator(); err != nil {
		return ipc.Reply{}, err
	}
	if !s.d.checking.CompareAndSwap(false, true) {
		return ipc.Reply{}, fmt.Errorf("check: another one is under way: %w (wait for it)", unix.EBUSY)
	}
	defer s.d.checking.Store(false)
	r, err := s.d.check(ctx)
	if err != nil {
		return ipc.Reply{}, fmt.Errorf("check: %w", err)
	}
	for i, p := range r.Problems {
		if i == 10 {
			s.log.Error("check: more problems", "count", len(r.Problems)+r.More-i)
			break
		}
		s.log.Error("check: "+p.What, "where", p.Where, "object", p.Object, "off", p.Off)
	}
	s.log.Info("checked", "problems", len(r.Problems)+r.More, "resident", r.VM.Resident, "stored", r.Paging.Pages, "took", r.Took.Round(time.Millisecond))
	return document("check", r)
}
