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
			if got := p.most(&objects[i]); (got == extentSize) != (objects[i].n < p.left) {
				t.Errorf("object %d has %d bytes of buffers, %d are left: it is said to get %d", i, objects[i].n, p.left, got)
			}
			b, err := p.tryGet(extentSize, &objects[i])
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
	if _, err := p.get(ctx, extentSize, &objects[2]); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("get while all are lent: %v", err)
	}
	got := make(chan []byte)
	go func() {
		b, _ := p.get(t.Context(), extentSize, &loan{})
		got <- b
	}()
	p.put(lent[0][0], &objects[0])
	select {
	case b := <-got:
		p.put(b, &loan{n: extentSize})
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
			t.Errorf("object %d has %d bytes after all came back", i, objects[i].n)
		}
	}
}

// Short returns do not take the place of long ones, and neither leaves more mapped than the limit.
func TestReturnBuffersOfTwoSizes(t *testing.T) {
	const limit = 4 * extentSize
	p := newBufferPool(limit)
	defer p.close()
	for range 3 {
		for _, size := range []int{shortReturn, extentSize} {
			var object loan
			var lent [][]byte
			for {
				b, err := p.tryGet(size, &object)
				if err != nil {
					break
				}
				lent = append(lent, b)
			}
			if want := limit / 2 / size; len(lent) != want {
				t.Errorf("%d buffers of %d bytes, want %d", len(lent), size, want)
			}
			if p.mapped > limit {
				t.Errorf("%d bytes are mapped, the limit is %d", p.mapped, limit)
			}
			for _, b := range lent {
				p.put(b[:1], &object)
			}
			if object.n != 0 || p.left != limit {
				t.Errorf("all came back: the object has %d bytes, %d are left", object.n, p.left)
			}
		}
	}
	// What is left when less than an extent is.
	var objects [4]loan
	var lent [4][]byte
	for i, size := range []int{shortReturn, extentSize, extentSize, extentSize} {
		var err error
		if lent[i], err = p.tryGet(size, &objects[i]); err != nil {
			t.Fatal(err)
		}
	}
	if got := p.most(new(loan)); got != shortReturn {
		t.Errorf("%d bytes are left, most is %d, want %d", p.left, got, shortReturn)
	}
	for i := range lent {
		p.put(lent[i], &objects[i])
	}
}
