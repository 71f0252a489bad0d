//go:build linux && cgo

package bench

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"

	"github.com/loopholelabs/userfaultfd-go/pkg/mapper"
	"github.com/loopholelabs/userfaultfd-go/pkg/transfer"
	"golang.org/x/sys/unix"

	"machpager/uffd"
)

// mapperSystem is userfaultfd-go's mapper: anonymous memory, one page per answer by COPY, the handler in another process as its transfer package has it.
type mapperSystem struct{}

const haveMapper = true

func (mapperSystem) open(w workload) (_ *target, err error) {
	if w.Op == Minor || w.Op == WriteProtect {
		return nil, fmt.Errorf("%w: userfaultfd-go answers missing pages only", errNone)
	}
	if w.Cluster > 1 {
		return nil, fmt.Errorf("%w: userfaultfd-go answers one page at a time", errNone)
	}
	mem, fd, start, err := mapper.Register(w.size())
	if err != nil {
		return nil, fmt.Errorf("userfaultfd-go: register: %w", err)
	}
	m := &mapperTarget{mem: mem, fd: int(fd)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("userfaultfd-go: %w", err), m.close())
		}
	}()
	if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		return nil, err
	}
	content := "zero"
	if w.Op == StoredRead {
		content = "stored"
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "mapper"), os.NewFile(uintptr(pair[1]), "mapper")
	m.socket = ours
	m.handler = exec.Command("/proc/self/exe")
	m.handler.Args = []string{argv0, "mapper", content, fmt.Sprint(len(mem))}
	m.handler.ExtraFiles = []*os.File{theirs}
	m.handler.Stderr = &m.stderr
	err = m.handler.Start()
	theirs.Close()
	if err != nil {
		m.handler = nil
		return nil, fmt.Errorf("start: %w", err)
	}
	c, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := transfer.SendUFFD(c.(*net.UnixConn), fd, start); err != nil {
		return nil, fmt.Errorf("send the userfaultfd: %w", err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		return nil, fmt.Errorf("the handler ended: %w: %s", err, &m.stderr)
	}
	return &target{mem: mem, stored: content == "stored", handlers: []int{m.handler.Process.Pid}, close: m.close}, nil
}

type mapperTarget struct {
	mem     []byte
	fd      int
	socket  *os.File
	handler *exec.Cmd
	stderr  bytes.Buffer
}

// close unmaps first: nothing can fault when the handler goes. Nothing but a signal ends a handler that waits for faults.
func (m *mapperTarget) close() error {
	err := syscall.Munmap(m.mem[:cap(m.mem)])
	if m.socket != nil {
		m.socket.Close()
	}
	if m.handler != nil {
		_ = m.handler.Process.Kill()
		_ = m.handler.Wait()
	}
	return errors.Join(err, unix.Close(m.fd))
}

// mapperMain is the handler process. args: the contents, the size in bytes. It gets a userfaultfd by fd 3.
func mapperMain(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("%d arguments", len(args))
	}
	var size int
	if _, err := fmt.Sscan(args[1], &size); err != nil {
		return err
	}
	var src io.ReaderAt = zeros{}
	if args[0] == "stored" {
		b := make([]byte, size)
		fillAll(b)
		src = bytes.NewReader(b)
	}
	c, err := net.FileConn(os.NewFile(3, "client"))
	if err != nil {
		return err
	}
	conn := c.(*net.UnixConn)
	fd, start, err := transfer.ReceiveUFFD(conn)
	if err != nil {
		return err
	}
	if _, err := conn.Write([]byte{'r'}); err != nil {
		return err
	}
	go func() {
		_, _ = conn.Read(make([]byte, 1)) // the end of the client
		os.Exit(0)
	}()
	u := uffd.FromFd(int(fd))
	for { // Handle ends with a signal, and with a page that is there already, whose thread may still wait
		herr := mapper.Handle(fd, start, src)
		if err := u.Wake(uint64(start), uint64(size)); err != nil {
			return fmt.Errorf("handle: %w; %w", herr, err)
		}
	}
}

// zeros reads as zeros, without end.
type zeros struct{}

func (zeros) ReadAt(b []byte, _ int64) (int, error) {
	clear(b)
	return len(b), nil
}
