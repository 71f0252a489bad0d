package vm

import (
	"context"
	"errors"
	"testing"
	"time"
)

// An object whose manager keeps what it is lent leaves some for others, and gets more when something comes back.
func TestReturnBuffersAreShared(t *testing.T) {
	p := newBufferPool(8 * extentSize)
	defer p.close()
	var objects [4]loan
	var lent [4][][]byte
	for i := range objects {
		for {
			b, err := p.tryGet(&objects[i])
			if errors.Is(err, errNoBuffer) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			lent[i] = append(lent[i], b)
		}
	}
	for i, want := range []int{4, 2, 1, 1} {
		if len(lent[i]) != want {
			t.Errorf("object %d has %d buffers, want %d", i, len(lent[i]), want)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := p.get(ctx, &objects[2]); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("get while all are lent: %v", err)
	}
	got := make(chan []byte)
	go func() {
		b, _ := p.get(t.Context(), &loan{})
		got <- b
	}()
	p.put(lent[0][0], &objects[0])
	select {
	case b := <-got:
		p.put(b, &loan{n: 1})
	case <-time.After(5 * time.Second):
		t.Fatal("nobody gets the buffer that came back")
	}
	for i := range objects {
		for _, b := range lent[i] {
			if i > 0 || &b[0] != &lent[0][0][0] {
				p.put(b, &objects[i])
			}
		}
		if objects[i].n != 0 {
			t.Errorf("object %d has %d buffers after all came back", i, objects[i].n)
		}
	}
}
