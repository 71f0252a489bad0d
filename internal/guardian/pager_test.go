package guardian_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/uffd"
)

const pagerRole = "guardian-test-pager"

// pagerMain stands in for a pager: it tells the guardian what a pager tells, reads the faults of one task, and answers none.
func pagerMain(args []string) error {
	time.AfterFunc(patience, func() { os.Exit(9) })
	var b [64]byte
	n, err := unix.Read(3, b[:])
	if err != nil || string(b[:n]) != "hello" {
		return fmt.Errorf("the link begins with %q, %w", b[:n], err)
	}
	unix.CloseOnExec(3)
	stop := make(chan struct{})
	c, err := guardian.NewClient(os.NewFile(3, "link"), func() { close(stop) }, accepts, slog.Default())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if args[0] == "eager" { // before it is its turn, perhaps
		time.Sleep(10 * time.Millisecond) // the first one's comes at once
		err := c.Put(ctx, guardian.Item{Kind: ipc.ItemSetting, ID: 1})
		if err != nil && c.Ready(ctx) == nil {
			return errors.New("a pager that may not say anything may say that it serves")
		}
		fmt.Println("eager", err == nil)
	}
	items, err := c.Items(ctx)
	if err != nil {
		return err
	}
	if f := lives[args[0]]; f != nil {
		return f(ctx, c, items, args[1:], stop)
	}
	if err := c.Ready(ctx); err != nil {
		return err
	}
	switch args[0] {
	case "silent":
		if _, err := serveNothing(ctx, c); err != nil {
			return err
		}
		select {} // also when it is asked to stop
	case "endtask":
		left, err := serveNothing(ctx, c)
		if err != nil {
			return err
		}
		if err := left(); err != nil {
			return err
		}
		<-stop
		return c.Close()
	case "drop":
		fd, err := uffd.Open(&uffd.OpenOptions{Features: uffd.RequiredFeatures})
		if err != nil {
			return err
		}
		sock, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
		if err != nil {
			return err
		}
		return errors.Join(putTask(ctx, c, 1, "one", fd.Fd(), sock[0]), putRange(ctx, c, 1, 7, guardian.Range{Start: 1 << 20, Len: page}), dropRange(ctx, c, 7),
			dropRange(ctx, c, 8), dropTask(ctx, c, 1), dropTask(ctx, c, 2), endTask(ctx, c, 3), c.Close())
	case "bad":
		return tellBad(ctx, c)
	}
	return fmt.Errorf("what is %q?", args[0])
}

// startTask starts a process in a role, and takes what it says about itself, its userfaultfd, and its socket.
func startTask(role string) (said string, raw, sock int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", 0, 0, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{role}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(pair[1]), role)}
	if err := cmd.Start(); err != nil {
		return "", 0, 0, err
	}
	unix.Close(pair[1])
	msg, oob := make([]byte, 256), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(pair[0], msg, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return "", 0, 0, err
	}
	cm, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(cm) != 1 {
		return "", 0, 0, fmt.Errorf("no userfaultfd: %w", err)
	}
	got, err := unix.ParseUnixRights(&cm[0])
	if err != nil {
		return "", 0, 0, err
	}
	return string(msg[:n]), got[0], pair[0], nil
}

// serveNothing starts a task, prepares its memory, and reads all the faults it is about to make. What it returns ends the task's service.
func serveNothing(ctx context.Context, c *guardian.Client) (func() error, error) {
	said, raw, sock, err := startTask(taskRole)
	if err != nil {
		return nil, err
	}
	var pid int
	var small, sparse, private uint64
	if _, err := fmt.Sscan(said, &pid, &small, &sparse, &private); err != nil {
		return nil, fmt.Errorf("task said %q: %w", said, err)
	}
	fd := uffd.FromFd(raw)
	err = errors.Join(putTask(ctx, c, 1, "the task", raw, sock), putRange(ctx, c, 1, 1, guardian.Range{Start: sparse, Len: sparseBytes}),
		putRange(ctx, c, 1, 2, guardian.Range{Start: small, Len: smallPages * page}), putRange(ctx, c, 1, 3, guardian.Range{Start: private, Len: 16 * page}))
	if err != nil {
		return nil, err
	}
	if _, err := fd.Copy(small+residentPage*page, bytes.Repeat([]byte{mark}, page), uffd.CopyWP); err != nil {
		return nil, err
	}
	if err := fd.WriteProtect(small+markerPage*page, page, uffd.WriteProtectWP); err != nil {
		return nil, err
	}
	unix.Write(sock, []byte("go"))
	want := copiers + 5
	seen := map[uint64]bool{}
	var msgs [64]uffd.Msg
	for len(seen) < want {
		n, err := fd.Read(msgs[:])
		if err != nil {
			return nil, err
		}
		for _, m := range msgs[:n] {
			seen[m.Address()&^(page-1)] = true
		}
		if n == 0 {
			unix.Poll([]unix.PollFd{{Fd: int32(fd.Fd()), Events: unix.POLLIN}}, 1000)
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%d faults of %d: %w", len(seen), want, ctx.Err())
		}
	}
	unix.Write(sock, []byte("all wait"))
	return func() error {
		fd.Close()
		return endTask(ctx, c, 1)
	}, nil
}

// tellBad tells the guardian what it must refuse.
func tellBad(ctx context.Context, c *guardian.Client) error {
	null, err := os.Open("/dev/null")
	if err != nil {
		return err
	}
	fd, err := uffd.Open(nil)
	if err != nil {
		return err
	}
	sock, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
	if err != nil {
		return err
	}
	if err := putTask(ctx, c, 1, "good", fd.Fd(), sock[0]); err != nil {
		return err
	}
	for name, f := range map[string]func() error{
		"a file for a userfaultfd": func() error { return putTask(ctx, c, 2, "", int(null.Fd()), sock[0]) },
		"a file for a socket":      func() error { return putTask(ctx, c, 2, "", fd.Fd(), int(null.Fd())) },
		"a range of no task":       func() error { return putRange(ctx, c, 9, 1, guardian.Range{Start: page, Len: page}) },
		"an empty range":           func() error { return putRange(ctx, c, 1, 1, guardian.Range{Start: page}) },
		"half a page":              func() error { return putRange(ctx, c, 1, 1, guardian.Range{Start: page, Len: 100}) },
		"a range without end":      func() error { return putRange(ctx, c, 1, 1, guardian.Range{Start: page, Len: ^uint64(page - 1)}) },
	} {
		err := f()
		if err == nil || errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Println("refused", name, err)
	}
	fmt.Println("refused all")
	return dropTask(ctx, c, 1)
}
