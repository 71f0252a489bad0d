//go:build linux

package region

import (
	"context"
	"errors"
	"io/fs"
	"strings"
	"sync"
	"testing"
	"time"

	"machpager/pager/emm"
)

func TestClose(t *testing.T) {
	p, _ := startFake(t, nil)
	r := mapObject(t, p, 3*4096, &ObjectOptions{Arg: "s1"}, nil)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() { // waits in the page nobody answers for
			var err error
			b := make([]byte, 3*4096)
			n := 0
			if i%2 == 0 {
				n, err = r.ReadAt(b, 0)
			} else {
				n, err = r.WriteAt(b, 0)
			}
			if n != 4096 || !errors.Is(err, ErrClosed) {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
		wg.Go(func() {
			if err := r.Populate(deadline(t), 0, 3*4096, false); !errors.Is(err, ErrClosed) {
				t.Errorf("populate: %v", err)
			}
		})
	}
	waitFaulting(t, 8)
	for range 4 {
		wg.Go(func() {
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if info, err := p.Info(deadline(t)); err != nil || info.Mappings != 0 {
				t.Errorf("a Close has returned: %+v, %v", info, err)
			}
		})
	}
	wg.Wait()
	if r.Bytes() != nil {
		t.Error("bytes of a closed region")
	}
	_, err := r.ReadAt(make([]byte, 1), 0)
	if !errors.Is(err, ErrClosed) || !errors.Is(err, fs.ErrClosed) {
		t.Error(err)
	}
	if err := r.PageOut(deadline(t), 0, 1); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	r.Stats()
}

func TestPagerClose(t *testing.T) {
	hook := 0
	p, _ := startFake(t, &ConnOptions{OnClose: func() error { hook++; return errors.New("the child fell") }})
	fds := count(t, "/proc/self/fd")
	o, err := p.ObjectCreate(deadline(t), 4096, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := o.Map(deadline(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := p.Close(); err == nil || !strings.Contains(err.Error(), "the child fell") {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	p.once, p.err = sync.Once{}, nil
	p.once.Do(func() {}) // the cleanup's Close wants no error
	if hook != 1 || r.Bytes() != nil || count(t, "/proc/self/fd") > fds {
		t.Errorf("hook ran %d times", hook)
	}
	_, err1 := p.ObjectCreate(deadline(t), 1, nil)
	_, err2 := o.Map(deadline(t), nil)
	_, err3 := p.Info(deadline(t))
	_, err4 := p.Allocate(deadline(t), 1, nil)
	_, err5 := p.ObjectOpen(deadline(t), emm.Port{})
	_, err6 := p.Objects(deadline(t))
	for i, err := range []error{err1, err2, err3, err4, err5, err6} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("call %d: %v", i+1, err)
		}
	}
	if err := errors.Join(r.Close(), o.Close()); err != nil {
		t.Error(err)
	}
}

// What a call made after its caller had gone is given back.
func TestCancelledMapIsUndone(t *testing.T) {
	p, _ := startFake(t, nil)
	o, err := p.ObjectCreate(deadline(t), 4096, &ObjectOptions{Arg: "m0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := o.Map(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		info, err := p.Info(deadline(t))
		if err != nil {
			t.Fatal(err)
		}
		if info.Budget == 1 && info.Mappings == 0 { // the fake's count of mappings ever made
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the mapping made for nobody is still there: %+v", info)
		}
	}
}
