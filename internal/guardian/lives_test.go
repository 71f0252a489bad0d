package guardian_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/uffd"
)

// lives are stand-in pagers that are told what an earlier one has left. Each says "life" and its pid, and Ready when it is.
var lives = map[string]func(ctx context.Context, c *guardian.Client, left []guardian.Item, args []string, stop <-chan struct{}) error{
	"keeper": keeper,
	"heir":   heir,
	"other":  heir,
	"quick":  quick,
	"broken": func(context.Context, *guardian.Client, []guardian.Item, []string, <-chan struct{}) error {
		os.Exit(7)
		return nil
	},
	"stuck":  func(context.Context, *guardian.Client, []guardian.Item, []string, <-chan struct{}) error { select {} },
	"greedy": greedy,
	"eager": func(ctx context.Context, c *guardian.Client, _ []guardian.Item, _ []string, _ <-chan struct{}) error {
		if err := c.Ready(ctx); err != nil {
			return err
		}
		select {}
	},
	"owned": owned,
}

// accepts is the state of version 1, for programs that are not the other one.
func accepts(state guardian.Item) error {
	if state.A != 1 || string(state.Tail) != "one" || os.Args[1] == "other" {
		return fmt.Errorf("state of version %d: %w", state.A, errors.ErrUnsupported)
	}
	return nil
}

const manyItems = 10000

// keeper puts many items, and in its second life finds them again.
func keeper(ctx context.Context, c *guardian.Client, left []guardian.Item, _ []string, stop <-chan struct{}) error {
	if len(left) > 0 {
		if err := checkKept(left); err != nil {
			fmt.Println("kept", err)
			return err
		}
		fmt.Println("kept all")
		guardian.CloseItems(left)
		if err := errors.Join(c.Put(ctx, guardian.Item{Kind: ipc.ItemSetting, ID: 1}), c.Ready(ctx)); err != nil {
			return err
		}
		<-stop
		return c.Close()
	}
	fd, err := unix.MemfdCreate("kept", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	unix.Pwrite(fd, []byte("kept"), 0)
	for n := range uint64(manyItems) {
		i := guardian.Item{Kind: ipc.ItemObject, ID: n, Parent: n + 1, A: n + 2, B: n + 3, Tail: binary.LittleEndian.AppendUint64(nil, n)}
		if n%10 == 0 {
			i.FD = fd
		}
		if err := c.Put(ctx, i); err != nil {
			return err
		}
	}
	for _, id := range []uint64{5, 20} { // one without, one with a descriptor: replaced, in its old place
		if err := c.Put(ctx, guardian.Item{Kind: ipc.ItemObject, ID: id, Tail: []byte("replaced")}); err != nil {
			return err
		}
	}
	err = errors.Join(c.Drop(ctx, ipc.ItemObject, 7), c.Drop(ctx, ipc.ItemObject, 30), c.Drop(ctx, ipc.ItemObject, 1<<40),
		c.Put(ctx, guardian.Item{Kind: ipc.ItemArena, ID: 7, Tail: make([]byte, ipc.MaxItemTail), FD: fd}))
	if err != nil {
		return err
	}
	if err := c.Put(ctx, guardian.Item{Kind: ipc.ItemArena, ID: 8, Tail: make([]byte, ipc.MaxItemTail+1)}); err == nil {
		return errors.New("a tail that is too long was taken")
	}
	if err := c.Ready(ctx); err != nil {
		return err
	}
	fmt.Println("put all")
	select {}
}

func checkKept(left []guardian.Item) error {
	if want := manyItems - 2 + 1; len(left) != want {
		return fmt.Errorf("%d items, want %d", len(left), want)
	}
	n := uint64(0)
	for _, i := range left[:len(left)-1] {
		for n == 7 || n == 30 {
			n++
		}
		want := guardian.Item{Kind: ipc.ItemObject, ID: n, Parent: n + 1, A: n + 2, B: n + 3}
		tail, fd := string(binary.LittleEndian.AppendUint64(nil, n)), n%10 == 0
		if n == 5 || n == 20 {
			want, tail, fd = guardian.Item{Kind: ipc.ItemObject, ID: n}, "replaced", false
		}
		if i.Kind != want.Kind || i.ID != want.ID || i.Parent != want.Parent || i.A != want.A || i.B != want.B || string(i.Tail) != tail || (i.FD > 0) != fd {
			return fmt.Errorf("got %+v, want %+v with %q and a descriptor %v", i, want, tail, fd)
		}
		var b [8]byte
		if k := 0; fd {
			if k, _ = unix.Pread(i.FD, b[:], 0); string(b[:k]) != "kept" {
				return fmt.Errorf("item %d: the file has %q", n, b[:k])
			}
		}
		n++
	}
	if i := left[len(left)-1]; i.Kind != ipc.ItemArena || len(i.Tail) != ipc.MaxItemTail || i.FD == 0 {
		return fmt.Errorf("the last is %+v", i)
	}
	return nil
}

// quick serves once, and ends at once in all later lives, with the status it was given.
func quick(ctx context.Context, c *guardian.Client, left []guardian.Item, args []string, _ <-chan struct{}) error {
	fmt.Println("life", os.Getpid())
	if len(left) == 0 {
		if err := errors.Join(c.Put(ctx, guardian.Item{Kind: ipc.ItemSetting, ID: 1}), c.Ready(ctx)); err != nil {
			return err
		}
		select {}
	}
	status := 0
	fmt.Sscan(args[0], &status)
	os.Exit(status)
	return nil
}

// greedy has more file descriptors held than the guardian has room for, and then no more than that.
func greedy(ctx context.Context, c *guardian.Client, left []guardian.Item, _ []string, stop <-chan struct{}) error {
	fmt.Println("left", len(left))
	if len(left) > 0 {
		guardian.CloseItems(left)
		if err := c.Ready(ctx); err != nil {
			return err
		}
		<-stop
		return c.Close()
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		return err
	}
	put := func(id uint64) error {
		return c.Put(ctx, guardian.Item{Kind: ipc.ItemObject, ID: id, FD: int(null.Fd())})
	}
	n := uint64(0)
	for err = put(n); err == nil; err = put(n) {
		n++
	}
	fmt.Println("refused", n, errors.Is(err, emm.ResourceShortage), err)
	err = errors.Join(put(0), c.Put(ctx, guardian.Item{Kind: ipc.ItemObject, ID: n}), c.Drop(ctx, ipc.ItemObject, 1), put(n), c.Drop(ctx, ipc.ItemObject, 1))
	if err != nil || put(n+1) == nil {
		return fmt.Errorf("when it is full: %w", err)
	}
	if err := c.Ready(ctx); err != nil {
		return err
	}
	select {}
}

// owned belongs to the client of the guardian: it answers it, and ends with it.
func owned(ctx context.Context, c *guardian.Client, left []guardian.Item, _ []string, _ <-chan struct{}) error {
	if len(left) == 0 {
		if err := c.Put(ctx, guardian.Item{Kind: ipc.ItemSetting, ID: 1}); err != nil {
			return err
		}
	}
	if err := c.Ready(ctx); err != nil {
		return err
	}
	var b [16]byte
	for {
		n, err := unix.Read(4, b[:])
		if err != nil {
			return err
		}
		if n == 0 {
			return c.Close()
		}
		unix.Write(4, b[:n])
	}
}

const (
	workerRole  = "guardian-test-worker"
	workerPages = 64
)

// heir serves one worker through many lives: each page is full of its number.
func heir(ctx context.Context, c *guardian.Client, left []guardian.Item, _ []string, stop <-chan struct{}) error {
	var raw, sock int
	var start uint64
	for _, i := range left {
		switch i.Kind {
		case ipc.ItemTask:
			raw = i.FD
		case ipc.ItemSocket:
			sock = i.FD
		case ipc.ItemRange:
			start = i.A
		}
	}
	if len(left) == 0 {
		var said string
		var err error
		if said, raw, sock, err = startTask(workerRole); err != nil {
			return err
		}
		fmt.Sscan(said, &start)
		if err := errors.Join(putTask(ctx, c, 1, "worker", raw, sock), putRange(ctx, c, 1, 1, guardian.Range{Start: start, Len: workerPages * page})); err != nil {
			return err
		}
		if err := c.Put(ctx, guardian.Item{Kind: ipc.ItemState, A: 1, Tail: []byte("one")}); err != nil {
			return err
		}
		unix.Write(sock, []byte("go"))
	}
	if raw <= 0 || sock <= 0 || start == 0 {
		return fmt.Errorf("%d items, of which not all: userfaultfd %d, socket %d, range %#x", len(left), raw, sock, start)
	}
	fd := uffd.FromFd(raw)
	if err := fd.Wake(start, workerPages*page); err != nil {
		return err
	}
	again := make(chan os.Signal, 1)
	signal.Notify(again, unix.SIGUSR1)
	if err := c.Ready(ctx); err != nil {
		return err
	}
	go func() {
		<-stop
		unix.Write(sock, []byte("end"))
	}()
	go func() {
		for range again {
			fmt.Println("upgrade", c.Replace(ctx))
		}
	}()
	var msgs [16]uffd.Msg
	contents := make([]byte, page)
	for {
		p := [...]unix.PollFd{{Fd: int32(raw), Events: unix.POLLIN}, {Fd: int32(sock), Events: unix.POLLRDHUP}}
		unix.Poll(p[:], -1)
		if p[1].Revents != 0 { // the worker has gone
			return errors.Join(dropTask(ctx, c, 1), c.Close())
		}
		n, err := fd.Read(msgs[:])
		if err != nil {
			return err
		}
		for _, m := range msgs[:n] {
			at := m.Address() &^ (page - 1)
			for i := range contents {
				contents[i] = byte((at-start)/page) + 1
			}
			if _, err := fd.Copy(at, contents, 0); err != nil {
				fd.Wake(at, page) // it is there already
			}
		}
	}
}

// workerMain touches pages, looks at what is in them, and throws them away, until it is told to end.
func workerMain() error {
	time.AfterFunc(patience, func() { os.Exit(9) })
	runtime.GOMAXPROCS(8) // a fault keeps its P
	fmt.Println("task", os.Getpid())
	fd, err := uffd.Open(&uffd.OpenOptions{Features: uffd.RequiredFeatures})
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, workerPages*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	if _, err := fd.Register(addr(mem), uint64(len(mem)), uffd.RegisterMissing); err != nil {
		return err
	}
	if err := unix.Sendmsg(3, []byte(fmt.Sprint(addr(mem))), unix.UnixRights(fd.Fd()), nil, 0); err != nil {
		return err
	}
	var b [16]byte
	if n, err := unix.Read(3, b[:]); n == 0 || err != nil {
		return fmt.Errorf("no word from the pager: %w", err)
	}
	var over atomic.Bool
	go func() {
		unix.Read(3, b[:])
		over.Store(true)
	}()
	touches := 0
	for ; !over.Load(); touches++ {
		p := touches * 7 % workerPages
		if got := load(&mem[p*page+touches%page]); got != byte(p)+1 {
			return fmt.Errorf("page %d has %d in it after %d touches", p, got, touches)
		}
		if err := unix.Madvise(mem[p*page:(p+1)*page], unix.MADV_DONTNEED); err != nil {
			return err
		}
	}
	fmt.Println("touches", touches)
	return nil
}
