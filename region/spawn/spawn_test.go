package spawn_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

// What this test binary is when its argv[0] says so.
const (
	plainRole = "spawn-test-plain" // a program that calls Main and then prints its arguments
	bareRole  = "spawn-test-bare"  // a program that does not call Main, and calls Start
	wordyRole = "spawn-test-wordy" // an init that panics in the child
)

func TestMain(m *testing.M) {
	if os.Args[0] == bareRole {
		_, err := spawn.Start(context.Background(), nil)
		fmt.Println(errors.Is(err, spawn.ErrNoMain), err)
		os.Exit(0)
	}
	if strings.HasPrefix(os.Args[0], "machpager-") && os.Getenv(wordyRole) != "" {
		panic("words before the end")
	}
	spawn.Main(managers...)
	if os.Args[0] == plainRole || strings.HasPrefix(os.Args[0], "machpager-") {
		fmt.Println("plain", os.Args[1:])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// managers are the program's own: one that tells about its process, one that refuses, one that never answers.
var managers = []spawn.Manager{
	{Name: "env", Open: func(context.Context, string, *os.File) (emm.Manager, error) {
		fmt.Println("printed by a manager")
		wd, _ := os.Getwd()
		pgid, _ := unix.Getpgid(0)
		return nil, fmt.Errorf("GODEBUG=%q TEST=%q wd=%s leader=%v", os.Getenv("GODEBUG"), os.Getenv("SPAWN_TEST"), wd, pgid == os.Getpid())
	}},
	{Name: "refuses", Open: func(_ context.Context, arg string, f *os.File) (emm.Manager, error) {
		b, err := io.ReadAll(f)
		return nil, fmt.Errorf("%s %s %v: %w", arg, b, err, unix.ENOTTY)
	}},
	{Name: "mute", Open: func(context.Context, string, *os.File) (emm.Manager, error) { return mute{}, nil }},
}

// mute takes everything and answers nothing.
type mute struct{}

func (mute) Init(h emm.Head, pageSize int) emm.KernReturn { return emm.Success }
func (mute) DataRequest(h emm.Head, want emm.Run, need int64, access emm.Prot) emm.KernReturn {
	return emm.Success
}
func (mute) DataReturn(h emm.Head, off int64, data []byte, dirty, kernelCopy bool) emm.KernReturn {
	return emm.Success
}
func (mute) Terminate(h emm.Head) emm.KernReturn { return emm.Success }

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// logBuffer collects a log.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func start(t *testing.T, o *spawn.Options) *region.Pager {
	t.Helper()
	if o == nil {
		o = &spawn.Options{}
	}
	if o.Resident == 0 {
		o.Resident = 16 << 20
	}
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	p, err := spawn.Start(testContext(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// ended waits for a process to be gone.
func ended(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); syscall.Kill(pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("process %d has not ended", pid)
		}
	}
}

func TestStart(t *testing.T) {
	for _, store := range []string{"", "memory"} {
		t.Run(fmt.Sprintf("store=%s", store), func(t *testing.T) {
			ctx := testContext(t)
			log := &logBuffer{}
			p := start(t, &spawn.Options{Store: store, Log: slog.New(slog.NewTextHandler(log, nil))})
			info, err := p.Info(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if info.Budget != 16<<20 || info.PagerPID == os.Getpid() || info.GuardianPID == os.Getpid() || info.PagerPID == info.GuardianPID {
				t.Errorf("odd info %+v", info)
			}
			for pid, want := range map[int]string{info.PagerPID: "machpager-pager\n", info.GuardianPID: "machpager-guard\n"} { // not exe
				if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err != nil || string(comm) != want {
					t.Errorf("process %d is called %q, want %q: %v", pid, comm, want, err)
				}
			}
			o, err := p.ObjectCreate(ctx, 1<<20, nil)
			if err != nil {
				t.Fatal(err)
			}
			r, err := o.Map(ctx, nil)
			if err != nil {
				t.Fatal(err)
			}
			b := r.Bytes()
			want := bytes.Repeat([]byte("machpager "), len(b)/10+1)[:len(b)]
			copy(b, want)
			for range 2 {
				if !bytes.Equal(b, want) {
					t.Fatal("not what was written")
				}
				if err := r.PageOut(ctx, 0, int64(len(b))); err != nil {
					t.Fatal(err)
				}
			}
			pages, err := o.Pages(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for i, pg := range pages {
				if byte(pg)&7 != 0 || byte(pg)&0x40 == 0 {
					t.Fatalf("page %d is %#x after page-out, want absent and stored", i, byte(pg))
				}
			}
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			ended(t, info.PagerPID)
			ended(t, info.GuardianPID)
			if !strings.Contains(log.String(), "the pager serves") {
				t.Errorf("the log lacks the pager's words: %s", log)
			}
		})
	}
}

// TestNoMain: a program that does not call Main gets an error, and never executes itself.
func TestNoMain(t *testing.T) {
	cmd := exec.CommandContext(testContext(t), "/proc/self/exe")
	cmd.Args = []string{bareRole}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "true start pager: spawn.Main was not called") {
		t.Errorf("got %q, %v", out, err)
	}
}

// TestMerelyCalledSo: argv[0] alone makes no pager, nor does it with any other socket on fd 3, whose contents are left alone.
func TestMerelyCalledSo(t *testing.T) {
	for _, role := range []string{"machpager-guardian", "machpager-pager"} {
		for _, packet := range []string{"", "hello", "machpager"} {
			for _, typ := range []int{unix.SOCK_SEQPACKET, unix.SOCK_STREAM, -1} {
				cmd := exec.CommandContext(testContext(t), "/proc/self/exe")
				cmd.Args = []string{role, "arguments"}
				var fds [2]int
				if typ >= 0 {
					var err error
					if fds, err = unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0); err != nil {
						t.Fatal(err)
					}
					if packet != "" {
						unix.Write(fds[0], []byte(packet))
					}
					cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fds[1]), "fd3")}
				}
				out, err := cmd.CombinedOutput()
				if err != nil || string(out) != "plain [arguments]\n" {
					t.Errorf("%s with %q on a socket of type %d: got %q, %v", role, packet, typ, out, err)
				}
				if typ >= 0 {
					if packet != "" {
						b := make([]byte, 100)
						n, _, err := unix.Recvfrom(fds[1], b, unix.MSG_DONTWAIT)
						if err != nil || string(b[:n]) != packet {
							t.Errorf("%s: of %q there is %q left, %v", role, packet, b[:max(n, 0)], err)
						}
					}
					unix.Close(fds[0])
					cmd.ExtraFiles[0].Close()
				}
			}
		}
	}
}

// TestGreeting: a greeting of another release, or for another role, is refused in words.
func TestGreeting(t *testing.T) {
	for packet, want := range map[string]string{
		`machpager child` + "\n" + `{"Version":99,"Role":"machpager-guardian"}`: "version 99",
		`machpager child` + "\n" + `{"Version":1,"Role":"machpager-pager"}`:     `for "machpager-pager"`,
		`machpager child` + "\n" + `{"Version"`:                                 "unexpected end",
	} {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Write(fds[0], []byte(packet))
		cmd := exec.CommandContext(testContext(t), "/proc/self/exe")
		cmd.Args = []string{"machpager-guardian"}
		cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fds[1]), "fd3")}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: got %q, %v; want %q", packet, out, err, want)
		}
		unix.Close(fds[0])
		cmd.ExtraFiles[0].Close()
	}
}

// TestStartFails: the error names the cause, also by errno or KernReturn, and nothing is left.
func TestStartFails(t *testing.T) {
	ctx := testContext(t)
	notDir := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notDir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		o    *spawn.Options
		is   error
		says string
	}{
		"no directory":     {ctx, &spawn.Options{Dir: "/nonexistent"}, unix.ENOENT, "/nonexistent"},
		"not a directory":  {ctx, &spawn.Options{Dir: notDir}, unix.ENOTDIR, notDir},
		"too little":       {ctx, &spawn.Options{Resident: 4096}, emm.InvalidArgument, "at least 32768"},
		"negative":         {ctx, &spawn.Options{Resident: -1}, emm.InvalidArgument, "-1 bytes"},
		"no executable":    {ctx, &spawn.Options{Executable: "/nonexistent"}, os.ErrNotExist, "/nonexistent"},
		"not machpager":    {ctx, &spawn.Options{Executable: "/bin/false"}, region.ErrPagerGone, "exit status 1"},
		"a file, no sock":  {ctx, &spawn.Options{Socket: notDir}, unix.EEXIST, "no socket"},
		"cancelled before": {cancelled, nil, context.Canceled, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := spawn.Start(c.ctx, c.o)
			if err == nil {
				p.Close()
				t.Fatal("started")
			}
			t.Log(err)
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %q, want %v and %q in it", err, c.is, c.says)
			}
		})
	}
	t.Run("last words", func(t *testing.T) {
		t.Setenv(wordyRole, "1")
		_, err := spawn.Start(ctx, nil)
		if err == nil || !strings.Contains(err.Error(), "words before the end") {
			t.Errorf("got %v, want the panic in it", err)
		}
	})
	t.Run("deadline", func(t *testing.T) { // a child that neither serves nor ends
		short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := spawn.Start(short, &spawn.Options{Executable: sleeper(t)})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 3*time.Second {
			t.Errorf("got %v after %v, want the deadline", err, time.Since(began))
		}
		for end := time.Now().Add(10 * time.Second); children(t) > 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the child is still there")
			}
		}
	})
}

// sleeper is an executable that does nothing for a while.
func sleeper(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "sleeper")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nexec sleep 60\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestChild: where the child lives, and what a manager of the program's own says in it.
func TestChild(t *testing.T) {
	t.Setenv("GODEBUG", "panicnil=1")
	t.Setenv("SPAWN_TEST", "yes")
	ctx := testContext(t)
	log := &logBuffer{}
	p := start(t, &spawn.Options{Log: slog.New(slog.NewTextHandler(log, nil))})
	_, err := p.ObjectCreate(ctx, 4096, &region.ObjectOptions{Manager: "env"})
	if err == nil || !strings.Contains(err.Error(), `GODEBUG="" TEST="yes" wd=/ leader=true`) {
		t.Errorf("got %v", err)
	}
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.WriteString("contents")
	f.Seek(0, io.SeekStart)
	_, err = p.ObjectCreate(ctx, 4096, &region.ObjectOptions{Manager: "refuses", Arg: "argument", File: f})
	if !errors.Is(err, unix.ENOTTY) || !strings.Contains(err.Error(), "argument contents <nil>") {
		t.Errorf("got %v", err)
	}
	_, err = p.ObjectCreate(ctx, 4096, &region.ObjectOptions{Manager: "nobody"})
	if !errors.Is(err, emm.InvalidName) {
		t.Errorf("got %v, want that nobody is called so", err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "printed by a manager") {
		t.Errorf("the log lacks what a manager printed: %s", log)
	}
}

// TestSocket: others can dial the pager of this program, which ends with this program all the same.
func TestSocket(t *testing.T) {
	ctx := testContext(t)
	socket := filepath.Join(t.TempDir(), "s", "pager.sock")
	p := start(t, &spawn.Options{Socket: socket})
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", st.Mode(), err)
	}
	q, err := region.Dial(ctx, socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	o, err := p.ObjectCreate(ctx, 4096, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := q.ObjectOpen(ctx, o.Port()); err != nil {
		t.Error(err)
	}
	if _, err := spawn.Start(ctx, &spawn.Options{Socket: socket, Resident: 1 << 20}); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second pager at the same socket: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := q.Info(ctx); !errors.Is(err, region.ErrPagerGone) {
		t.Errorf("got %v, want that the pager is gone", err)
	}
	q.Close()
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// TestRightsEnd: an object ends with its last right, whoever has its port.
func TestRightsEnd(t *testing.T) {
	ctx := testContext(t)
	p := start(t, nil)
	count := func() int {
		t.Helper()
		list, err := p.Objects(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	o, err := p.ObjectCreate(ctx, 4096, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := o.Map(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Bytes()[0] = 1
	port := o.Port()
	o.Close()
	again, err := p.ObjectOpen(ctx, port) // the mapping is a right
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	if n := count(); n != 1 {
		t.Errorf("%d objects, want 1", n)
	}
	again.Close()
	if n := count(); n != 0 {
		t.Errorf("%d objects, want 0", n)
	}
	if _, err := p.ObjectOpen(ctx, port); !errors.Is(err, emm.InvalidArgument) {
		t.Errorf("got %v, want no object", err)
	}
	info, err := p.Info(ctx)
	if err != nil || info.Resident != 0 || info.KernelResident != 0 {
		t.Errorf("%+v, %v: want nothing resident", info, err)
	}
}

// TestPagerKilledClose: Close of a pager that was killed, and that no other follows, tells of it, and leaves nobody.
func TestPagerKilledClose(t *testing.T) {
	ctx := testContext(t)
	p := start(t, &spawn.Options{Restarts: -1})
	info, err := p.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.Allocate(ctx, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Bytes()[0] = 1
	syscall.Kill(info.PagerPID, syscall.SIGKILL)
	fault := region.Guard(func() error {
		r.Bytes()[1<<19] = 1
		return nil
	})
	if fe := (*region.FaultError)(nil); !errors.As(fault, &fe) {
		t.Errorf("got %v, want a *FaultError", fault)
	}
	if err := p.Close(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("Close says %v, want the end of the pager", err)
	}
	ended(t, info.GuardianPID)
}

// TestMuteManager: a manager that never answers keeps nobody: neither the program in Close, nor the children from their end.
func TestMuteManager(t *testing.T) {
	ctx := testContext(t)
	p := start(t, nil)
	info, err := p.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.Allocate(ctx, 1<<20, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{Manager: "mute"}})
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if err := r.Populate(short, 0, 4096, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
	began := time.Now()
	err = p.Close()
	t.Logf("Close took %v: %v", time.Since(began), err)
	ended(t, info.PagerPID)
	ended(t, info.GuardianPID)
}

// TestNothingLeft: fds, goroutines and children after many pagers.
func TestNothingLeft(t *testing.T) {
	once := func() {
		p := start(t, &spawn.Options{Store: "memory"})
		if r, err := p.Allocate(testContext(t), 1<<20, nil); err != nil {
			t.Fatal(err)
		} else {
			r.Bytes()[0] = 1
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	once()
	before := countFDs(t)
	for range 10 {
		once()
	}
	if after := countFDs(t); after > before {
		t.Errorf("%d file descriptors before, %d after", before, after)
	}
	if n := children(t); n > 0 {
		t.Errorf("%d children are left", n)
	}
}

// children counts the children of this process, by any of its threads.
func children(t *testing.T) int {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		b, _ := os.ReadFile(f)
		n += len(strings.Fields(string(b)))
	}
	return n
}

func countFDs(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}
