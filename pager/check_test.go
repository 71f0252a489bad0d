package pager

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
	"machpager/pager/store"
	"machpager/pager/store/storetest"
)

func problems(t *testing.T, p *Pager) (list []Problem, c Checked) {
	t.Helper()
	c, err := p.Check(context.Background(), func(x Problem) { list = append(list, x) })
	if err != nil {
		t.Fatal(err)
	}
	return list, c
}

// Check finds nothing wrong, at rest or while objects and snapshots come and go.
func TestCheckLive(t *testing.T) {
	for name, open := range stores {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			p := newPager(t, s)
			k, port := attach(t, p, 64, ps)
			k.Write(0, emmtest.Fill(32, ps, 1))
			copied := emm.NewPort()
			if err := p.Snapshot(port, copied); err != nil {
				t.Fatal(err)
			}
			k.Write(0, emmtest.Fill(8, ps, 2))
			big, _ := attach(t, p, 4, 64<<10)
			big.Write(0, emmtest.Fill(4, 64<<10, 3))
			list, c := problems(t, p)
			if want := (Checked{Objects: 3, Pages: 32 + 32 + 4, Bytes: (64 + 4*16) * ps, Slots: 40 + 64, Shared: 24}); len(list) > 0 || c != want {
				t.Errorf("at rest: %+v, %+v, want %+v", list, c, want)
			}

			var ports sync.Map
			stop := make(chan struct{})
			var workers sync.WaitGroup
			for i := range uint64(3) {
				workers.Go(func() {
					for n := i; ; n += 3 {
						select {
						case <-stop:
							return
						default:
						}
						churnObject(t, p, &ports, n)
						to := emm.NewPort()
						if err := p.Snapshot(port, to); err != nil {
							t.Error(err)
							return
						}
						p.NoSenders(to)
					}
				})
			}
			looks := 0
			for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end) || looks < 3; looks++ {
				if list, c := problems(t, p); len(list) > 0 {
					t.Errorf("look %d: %+v, %+v", looks, list, c)
					break
				}
			}
			close(stop)
			workers.Wait()
			if list, c := problems(t, p); len(list) > 0 || c.Uncounted > 0 {
				t.Errorf("at the end: %+v, %+v", list, c)
			}
			t.Logf("%d looks", looks)
		})
	}
}

// Check finds each thing that is broken for it, and says where.
func TestCheckFinds(t *testing.T) {
	f := storetest.NewFaulty(memoryStore(t, nil))
	p := newPager(t, f)
	k, port := attach(t, p, 64, ps)
	k.Write(0, emmtest.Fill(32, ps, 1))
	other, _ := attach(t, p, 64, ps)
	other.Write(0, emmtest.Fill(32, ps, 2))
	o, x := p.lookup(port), p.live()[1]
	set := func(o *object, page int64, w uint64) { // behind everybody's back
		o.mu.Lock()
		defer o.mu.Unlock()
		o.words[page].Store(w)
	}
	was, theirs := o.words[3].Load(), x.words[3].Load()
	var leaked store.Slot
	for _, c := range []struct {
		name   string
		break_ func() (heal func())
		want   []string
		object int
		off    int64
	}{
		{"a checksum does not match", func() func() {
			return f.Inject(storetest.Fault{Label: "rot", On: storetest.OnRead, Corrupt: true, Short: 5, Times: 1})
		}, []string{"stored page cannot be read back: injected fault \"rot\""}, o.id, 5 * ps},
		{"the store fails", func() func() {
			return f.Inject(storetest.Fault{Label: "gone", On: storetest.OnRead, Times: 1, Err: store.ErrNoSpace})
		}, []string{"stored page cannot be read back: injected fault \"gone\""}, o.id, 0},
		{"two objects use one slot", func() func() {
			set(x, 3, was)
			return func() { set(x, 3, theirs) }
		}, []string{"is used by 2 page maps, and counted for 1", "no page map names 1 of them"}, o.id, 3 * ps},
		{"one object uses a slot twice", func() func() {
			set(x, 4, theirs)
			w := storedWord(wordSlot(theirs) + 1)
			return func() { set(x, 4, w) }
		}, []string{"is used twice: also for object", "no page map names 1 of them"}, x.id, 3 * ps},
		{"a slot is nobody's", func() func() {
			leaked, _, _ = f.Alloc(1, 1)
			return func() { f.Free(leaked, 1) }
		}, []string{"65 slots are in use in the store, and no page map names 1 of them"}, -1, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			heal := c.break_()
			list, _ := problems(t, p)
			heal()
			if len(list) != len(c.want) {
				t.Fatalf("%+v, want %q", list, c.want)
			}
			for i, want := range c.want {
				if !strings.Contains(list[i].What, want) {
					t.Errorf("%+v, want %q", list[i], want)
				}
			}
			if list[0].Object != c.object || list[0].Off != c.off {
				t.Errorf("%+v, want it of object %d at %d", list[0], c.object, c.off)
			}
		})
	}
	if list, _ := problems(t, p); len(list) > 0 {
		t.Errorf("after all was healed: %+v", list)
	}
}
