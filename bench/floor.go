//go:build linux

package bench

import (
	"bytes"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"machpager/uffd"
)

//go:embed floor/floor.c
var floorSource []byte

// compileFloor makes the C floor's program in dir. The C compiler is $CC, else gcc.
func compileFloor(dir string) (string, error) {
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "gcc"
	}
	if _, err := exec.LookPath(cc); err != nil {
		return "", fmt.Errorf("compile the C floor: %w (install a C compiler and the kernel headers with `make deps`, or leave the C floor out)", err)
	}
	source, program := filepath.Join(dir, "floor.c"), filepath.Join(dir, "floor")
	if err := os.WriteFile(source, floorSource, 0o600); err != nil {
		return "", fmt.Errorf("compile the C floor: %w", err)
	}
	if out, err := exec.Command(cc, "-O2", "-pthread", "-o", program, source).CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile the C floor: %s: %w\n%s(`make deps` installs the compiler and the headers)", cc, err, out)
	}
	return program, nil
}

// How the C floor answers; the same numbers are in floor.c.
const (
	floorStored = 1 << 0 // the pages have contents
	floorPwrite = 1 << 1 // fill by pwrite to the file and CONTINUE
	floorPoll   = 1 << 2 // poll, then read
)

// floorHello is struct hello of floor.c.
type floorHello struct {
	Base    [2]uint64 // where the file is mapped, one or two times
	Size    uint64    // bytes of one mapping
	Cluster uint64    // bytes per answer
	Flags   uint64
}

// floorSystem is memory whose faults the C floor answers: a new file, mapping, userfaultfd and handler process for each workload.
type floorSystem struct {
	program string
	flags   uint64
}

func (s floorSystem) open(w workload) (_ *target, err error) {
	if s.flags&floorPwrite != 0 && w.Cluster*pageSize != extent {
		return nil, fmt.Errorf("%w: only whole extents of 2 MiB are filled so", errNone)
	}
	f := &floorTarget{size: w.size()}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("run the C floor: %w", err), f.close())
		}
	}()
	if f.file, err = framesFile(f.size); err != nil {
		return nil, err
	}
	f.uffd, err = uffd.Open(&uffd.OpenOptions{Features: uffd.RequiredFeatures, Blocking: s.flags&floorPoll == 0})
	if err != nil {
		return nil, err
	}
	a, err := f.mapFile()
	if err != nil {
		return nil, err
	}
	h := floorHello{Base: [2]uint64{address(a)}, Size: uint64(f.size), Cluster: uint64(w.Cluster) * pageSize, Flags: s.flags}
	t := &target{mem: a, stored: w.Op == StoredRead || w.Op == Minor}
	if t.stored {
		h.Flags |= floorStored
	}
	if w.Op == Minor {
		if t.mem, err = f.mapFile(); err != nil {
			return nil, err
		}
		h.Base[1] = address(t.mem)
	}
	pid, err := f.start(s.program, h)
	if err != nil {
		return nil, err
	}
	t.handlers, t.close = []int{pid}, f.close
	if w.Op == Minor || w.Op == WriteProtect {
		if err := readAll(a, t.stored); err != nil {
			return nil, err
		}
	}
	return t, nil
}

type floorTarget struct {
	size     int
	file     *os.File
	uffd     *uffd.FD
	mappings []*mapping
	handler  *exec.Cmd
	socket   *os.File
	once     sync.Once
	err      error
}

// mapFile maps the file as the pager's tasks do, and registers the memory.
func (f *floorTarget) mapFile() ([]byte, error) {
	m, err := mapMemory(int(f.file.Fd()), f.size)
	if err != nil {
		return nil, err
	}
	f.mappings = append(f.mappings, m)
	_, err = f.uffd.Register(address(m.mem), uint64(f.size), uffd.RegisterMissing|uffd.RegisterMinor|uffd.RegisterWP)
	return m.mem, err
}

// start runs the handler and waits until it answers faults.
func (f *floorTarget) start(program string, h floorHello) (pid int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("make a socket: %w", err)
	}
	f.socket = os.NewFile(uintptr(pair[0]), "floor")
	theirs := os.NewFile(uintptr(pair[1]), "floor")
	var stderr bytes.Buffer
	cmd := exec.Command(program)
	cmd.Stderr = &stderr
	cmd.ExtraFiles = []*os.File{theirs}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return 0, fmt.Errorf("start: %w", err)
	}
	f.handler = cmd
	var msg bytes.Buffer
	if err := binary.Write(&msg, binary.NativeEndian, h); err != nil {
		return 0, err
	}
	if err := unix.Sendmsg(pair[0], msg.Bytes(), unix.UnixRights(f.uffd.Fd(), int(f.file.Fd())), nil, 0); err != nil {
		return 0, fmt.Errorf("send the userfaultfd: %w", err)
	}
	ready := make([]byte, 1)
	if n, err := f.socket.Read(ready); n != 1 {
		f.socket.Close()
		_ = cmd.Wait()
		f.handler = nil
		return 0, fmt.Errorf("the handler ended (%v): %s", err, strings.TrimSpace(stderr.String()))
	}
	return cmd.Process.Pid, nil
}

// close unmaps first: nothing can fault when the handler goes.
func (f *floorTarget) close() error {
	f.once.Do(func() {
		var errs []error
		for _, m := range f.mappings {
			errs = append(errs, m.close())
		}
		if f.socket != nil {
			f.socket.Close()
		}
		if f.handler != nil {
			if err := f.handler.Wait(); err != nil {
				errs = append(errs, fmt.Errorf("run the C floor: %w: %s", err, f.handler.Stderr))
			}
		}
		if f.uffd != nil {
			errs = append(errs, f.uffd.Close())
		}
		if f.file != nil {
			errs = append(errs, f.file.Close())
		}
		f.err = errors.Join(errs...)
	})
	return f.err
}
