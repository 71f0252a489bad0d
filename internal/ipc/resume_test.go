package ipc

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
)

// heirs is the pager's end of a connection, which passes from one pager to the next.
type heirs struct {
	t    *testing.T
	file *os.File // the socket, as a guardian holds it
	now  *Link
	dead chan struct{} // closed when the pager that serves is to end
}

// inherit makes a task's Link and the socket at its other end, where nobody serves yet.
func inherit(t *testing.T, o *LinkOptions) (*Link, *heirs) {
	t.Helper()
	noNewFDs(t)
	a, f, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	if o == nil {
		o = &LinkOptions{}
	}
	o.Resend = true
	client := NewLink(a, o)
	h := &heirs{t: t, file: f}
	t.Cleanup(func() {
		client.Close()
		if h.now != nil {
			h.now.Close()
		}
		f.Close()
	})
	return client, h
}

// next ends the pager that serves, without a word, and lets another take over. The first one takes over nothing.
func (h *heirs) next(handler Handler) {
	h.t.Helper()
	o := &LinkOptions{Handler: handler}
	if h.now != nil {
		h.kill()
		o.Restarted = &Restarted{PagerPID: 2}
	}
	conn, err := FileConn(h.file)
	if err != nil {
		h.t.Fatal(err)
	}
	h.dead = make(chan struct{})
	h.now = NewLink(conn, o)
}

// kill ends the pager that serves: what its handlers answer from here on does not go out.
func (h *heirs) kill() {
	h.now.Hangup()
	select {
	case <-h.dead:
	default:
		close(h.dead)
	}
	h.now.Close()
}

// deaf serves as a pager that answers nothing while it lives.
func (h *heirs) deaf(got chan<- *Message) {
	h.t.Helper()
	dead := make(chan chan struct{}, 1)
	h.next(func(ctx context.Context, m *Message) (Reply, error) {
		got <- &Message{Header: m.Header, Body: m.Body}
		d := <-dead
		dead <- d
		<-d
		return Reply{}, ctx.Err()
	})
	dead <- h.dead
}

func openPort(i int) ObjectOpen {
	var q ObjectOpen
	q.Port[0], q.Port[1] = byte(i), byte(i>>8)
	return q
}

// What the dead pager had read, what it had not, and what was never sent: each call ends once, with its own answer.
func TestRestartedAnswersAll(t *testing.T) {
	var pids atomic.Int32 // the race detector does not follow a socket
	client, h := inherit(t, &LinkOptions{InFlight: 16, OnRestart: func(r Restarted) { pids.Add(r.PagerPID) }})
	got := make(chan *Message, 100)
	h.deaf(got)
	var wg sync.WaitGroup
	for i := range 40 { // 16 are in flight, the others wait for their turn
		wg.Go(func() {
			m, err := client.Call(t.Context(), TypeObjectOpen, openPort(i), nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer m.Close()
			if r, _, err := Decode[ObjectReply](m.Body); err != nil || r.Handle != uint64(i) {
				t.Errorf("call %d got %+v, %v", i, r, err)
			}
		})
	}
	var mu sync.Mutex
	first := map[uint32]bool{} // guarded by mu
	for range 16 {
		m := <-got
		mu.Lock()
		first[m.Seq] = true
		mu.Unlock()
	}
	served := map[uint32]int{}
	h.next(func(ctx context.Context, m *Message) (Reply, error) {
		mu.Lock()
		served[m.Seq]++
		if m.Resent() != first[m.Seq] {
			t.Errorf("request %d: resent: %v, read by the dead pager: %v", m.Seq, m.Resent(), first[m.Seq])
		}
		mu.Unlock()
		return echo(ctx, m)
	})
	wg.Wait()
	mu.Lock()
	defer mu.Unlock()
	for seq, n := range served {
		if n != 1 {
			t.Errorf("request %d came %d times", seq, n)
		}
	}
	if len(served) != 40 || pids.Load() != 2 {
		t.Errorf("%d requests, pager %d", len(served), pids.Load())
	}
}

// A reply that was sent before the pager died is the reply: nothing is asked again.
func TestAnsweredIsNotResent(t *testing.T) {
	client, h := inherit(t, nil)
	h.next(echo)
	for i := range 10 {
		if _, err := client.Call(t.Context(), TypeObjectOpen, openPort(i), nil); err != nil {
			t.Fatal(err)
		}
	}
	h.next(func(ctx context.Context, m *Message) (Reply, error) {
		if m.Seq <= 10 {
			t.Errorf("request %d was sent again", m.Seq)
		}
		return echo(ctx, m)
	})
	if _, err := client.Call(t.Context(), TypeObjectOpen, openPort(1), nil); err != nil {
		t.Fatal(err)
	}
}

// A file goes with the request again, although the caller may have gone and closed it.
func TestFilesAreResent(t *testing.T) {
	client, h := inherit(t, nil)
	inode := func(fd int) uint64 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Error(err)
		}
		return st.Ino
	}
	got := make(chan *Message, 2)
	h.deaf(got)
	stay, leave := temp(t), temp(t)
	want := map[uint64]bool{inode(int(stay.Fd())): true, inode(int(leave.Fd())): true}
	tail, err := AppendStrings(nil, "file", "")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		m, err := client.Call(t.Context(), TypeObjectCreate, ObjectCreate{}, &CallOptions{Tail: tail, FDs: []int{int(stay.Fd())}})
		if err != nil {
			t.Error(err)
			return
		}
		m.Close()
	})
	ctx, cancel := context.WithCancel(t.Context())
	undone := make(chan uint64, 1)
	wg.Go(func() {
		_, err := client.Call(ctx, TypeObjectCreate, ObjectCreate{}, &CallOptions{Tail: tail, FDs: []int{int(leave.Fd())}, Late: func(m *Message) {
			r, _, _ := Decode[ObjectReply](m.Body)
			undone <- r.Handle
		}})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		leave.Close()
	})
	gone := uint32(0)
	for range 2 {
		<-got
	}
	cancel()
	// The caller is gone when its Cancel is on the way; what the dead pager makes of it does not matter.
	for gone == 0 {
		client.mu.Lock()
		for seq, c := range client.pending {
			if c.gone {
				gone = seq
			}
		}
		client.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	h.kill()
	var mu sync.Mutex
	h.next(func(ctx context.Context, m *Message) (Reply, error) {
		ino := inode(m.FD(0))
		mu.Lock()
		if !want[ino] || !m.Resent() {
			t.Errorf("request %d brought file %d, resent: %v; want one of %v, once", m.Seq, ino, m.Resent(), want)
		}
		delete(want, ino)
		mu.Unlock()
		if m.Seq == gone {
			select {
			case <-ctx.Done(): // the Cancel came again too
			case <-time.After(10 * time.Second):
				t.Error("a call that nobody waits for was not cancelled again")
			}
		}
		return Reply{Body: ObjectReply{Handle: uint64(m.Seq)}}, nil
	})
	wg.Wait()
	if n := <-undone; n != uint64(gone) {
		t.Errorf("%d was undone, want %d", n, gone)
	}
}

// The connection of a task that died, or is closed, while it is taken over ends like any other, and gives back what it kept.
func TestEndsWhileResuming(t *testing.T) {
	f := temp(t)
	for _, end := range []func(*Link, *heirs){
		func(c *Link, h *heirs) { c.Close() },
		func(c *Link, h *heirs) { h.kill(); h.file.Close() },
		func(c *Link, h *heirs) { h.next(nil); c.Close() },
		func(c *Link, h *heirs) { h.next(nil); h.file.Close(); h.kill() },
	} {
		client, h := inherit(t, nil)
		got := make(chan *Message, 8)
		h.deaf(got)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				_, err := client.Call(t.Context(), TypeTaskUffd, TaskUffd{}, &CallOptions{FDs: []int{int(f.Fd())}})
				if !errors.Is(err, ErrGone) && !errors.Is(err, ErrClosed) && !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrUnknown) {
					t.Error(err)
				}
			})
		}
		h.kill()
		end(client, h)
		wg.Wait()
	}
}

// Pagers that die one after the other, at any moment, the taking over included: no call fails, none is done twice by one pager, and a request that is
// not marked as sent again was never served before.
func TestManyHeirs(t *testing.T) {
	for _, inFlight := range []int{1, 7, 128} {
		t.Run(fmt.Sprint(inFlight), func(t *testing.T) {
			client, h := inherit(t, &LinkOptions{InFlight: inFlight})
			f := temp(t)
			var mu sync.Mutex
			ever := map[uint32]bool{}
			var resent, calls atomic.Int64
			heir := func() Handler {
				mine := map[uint32]bool{} // guarded by mu
				return func(ctx context.Context, m *Message) (Reply, error) {
					mu.Lock()
					if mine[m.Seq] {
						t.Errorf("request %d came twice to one pager", m.Seq)
					}
					if ever[m.Seq] && !m.Resent() {
						t.Errorf("request %d was served before, and does not say so", m.Seq)
					}
					mine[m.Seq], ever[m.Seq] = true, true
					mu.Unlock()
					if m.Resent() {
						resent.Add(1)
					}
					select {
					case <-time.After(time.Duration(rand.IntN(300)) * time.Microsecond):
					case <-ctx.Done():
					}
					if m.Type == TypeObjectCreate {
						return Reply{Body: ObjectReply{Handle: uint64(m.Seq)}}, nil
					}
					return echo(ctx, m)
				}
			}
			h.next(heir())
			stop := make(chan struct{})
			var wg sync.WaitGroup
			tail, err := AppendStrings(nil, "", "")
			if err != nil {
				t.Fatal(err)
			}
			for g := range 20 {
				wg.Go(func() {
					for i := 0; ; i++ {
						select {
						case <-stop:
							return
						default:
						}
						calls.Add(1)
						switch (g + i) % 8 {
						case 0:
							m, err := client.Call(t.Context(), TypeObjectCreate, ObjectCreate{}, &CallOptions{Tail: tail, FDs: []int{int(f.Fd())}})
							if err != nil {
								t.Errorf("call with a file: %v", err)
								return
							}
							m.Close()
						case 1:
							ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(500))*time.Microsecond)
							if m, err := client.Call(ctx, TypeObjectOpen, openPort(i), nil); err == nil {
								m.Close()
							} else if !errors.Is(err, context.DeadlineExceeded) {
								t.Errorf("call that is given up: %v", err)
							}
							cancel()
						default:
							m, err := client.Call(t.Context(), TypeObjectOpen, openPort(g<<8|i&0xff), nil)
							if err != nil {
								t.Error(err)
								return
							}
							if r, _, err := Decode[ObjectReply](m.Body); err != nil || r.Handle != uint64(g<<8|i&0xff) {
								t.Errorf("call %d.%d got %+v, %v", g, i, r, err)
							}
							m.Close()
						}
					}
				})
			}
			for range 200 {
				time.Sleep(time.Duration(rand.IntN(1500)) * time.Microsecond)
				h.next(heir())
			}
			close(stop)
			wg.Wait()
			if resent.Load() == 0 {
				t.Error("nothing was ever sent again")
			}
			t.Logf("%d calls, %d requests sent again", calls.Load(), resent.Load())
		})
	}
}

// A peer that answers another Restarted than the one it was sent has not answered.
func TestStaleAnswer(t *testing.T) {
	noNewFDs(t)
	conn, raw := rawPair(t)
	served := make(chan uint32, 8)
	l := NewLink(conn, &LinkOptions{Restarted: &Restarted{}, Handler: func(_ context.Context, m *Message) (Reply, error) {
		served <- m.Seq
		return Reply{}, emm.Failure
	}})
	t.Cleanup(func() { l.Close() })
	b := make([]byte, MaxFrame)
	n, err := unix.Read(raw, b)
	if err != nil {
		t.Fatal(err)
	}
	ask, err := ParseHeader(b[:n])
	if err != nil || ask.Type != TypeRestarted || ask.Seq == 0 {
		t.Fatalf("first frame: %+v, %v", ask, err)
	}
	ok := make([]byte, statusSize)
	send := func(h Header, body []byte) {
		h.Version, h.Length = Version, uint32(len(body))
		if _, err := unix.Write(raw, frame(h, body)); err != nil {
			t.Fatal(err)
		}
	}
	send(Header{Type: TypeInfo, Seq: 1}, nil)
	send(Header{Type: TypeRestarted, Seq: ask.Seq + 1, Flags: FlagReply}, ok)
	send(Header{Type: TypeInfo, Seq: ask.Seq, Flags: FlagReply}, ok)
	send(Header{Type: TypeInfo, Seq: 2}, nil)
	unix.Write(raw, []byte("no header"))
	send(Header{Type: TypeRestarted, Seq: ask.Seq, Flags: FlagReply}, ok)
	send(Header{Type: TypeInfo, Seq: 3, Flags: FlagResend}, nil)
	select {
	case seq := <-served:
		if seq != 3 {
			t.Errorf("request %d was served, want 3 alone", seq)
		}
	case <-l.Done():
		t.Fatal(l.Err())
	}
	if n, err = unix.Read(raw, b); err != nil {
		t.Fatal(err)
	}
	if r, err := ParseHeader(b[:n]); err != nil || r.Seq != 3 || !r.Reply() {
		t.Errorf("answered %+v, %v", r, err)
	}
}

// Whoever does not answer Restarted, floods in its place, or refuses it, loses its own connection, or waits, alone.
func TestBadHeirsPeer(t *testing.T) {
	noNewFDs(t)
	hello := frame(Header{Version: Version, Type: TypeHello, Seq: 1, Length: 16}, make([]byte, 16))

	conn, raw := rawPair(t)
	flood := NewLink(conn, &LinkOptions{Restarted: &Restarted{}, InFlight: 4})
	for range 65 {
		if _, err := unix.Write(raw, hello); err != nil {
			break
		}
	}
	<-flood.Done()
	if err := flood.Err(); !errors.Is(err, ErrMalformed) {
		t.Errorf("flood: %v", err)
	}
	flood.Close()

	conn, f, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	peer, err := FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	old := NewLink(peer, nil) // knows no Restarted
	refused := NewLink(conn, &LinkOptions{Restarted: &Restarted{}})
	<-refused.Done()
	if err := refused.Err(); !errors.Is(err, ErrUnknown) {
		t.Errorf("a peer that refuses: %v", err)
	}
	refused.Close()
	old.Close()

	conn, raw = rawPair(t)
	if err := unix.SetNonblock(raw, true); err != nil {
		t.Fatal(err)
	}
	silent := NewLink(conn, &LinkOptions{Restarted: &Restarted{}, Handler: func(context.Context, *Message) (Reply, error) {
		t.Error("a request was served before the silence was answered")
		return Reply{}, nil
	}})
	unix.Write(raw, hello)
	time.Sleep(20 * time.Millisecond)
	if err := silent.Err(); err != nil {
		t.Errorf("a silent peer: %v", err)
	}
	silent.Close() // at once, whatever the peer does
}
