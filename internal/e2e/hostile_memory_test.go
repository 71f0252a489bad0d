package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/uffd"
)

func init() {
	attacks["unregistered"] = unregistered
	attacks["in flight"] = inFlight
	attacks["forks"] = forks
	attacks["execs"] = execs
	attacks["registers again"] = registersAgain
	attacks["strange files"] = strangeFiles
	attacks["leaves without end"] = leavesWithoutEnd
	tasks["villain that execs"] = execTask
}

// unregistered touches the object's file through a second mapping that nobody serves, while the first is paged out.
func unregistered(v *villain) error {
	m, err := v.mapObject(8 << 20)
	if err != nil {
		return err
	}
	at, err := mmap(m.file, m.size, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	own := mapped{addr: at, size: m.size}
	for end := time.Now().Add(v.limit); time.Now().Before(end); {
		p := rand.Int64N(m.size/4096) * 4096
		try(func() { m.bytes()[p]++ })
		try(func() { own.bytes()[rand.Int64N(m.size)]++ })
		if p%(64*4096) == 0 {
			go v.do(ipc.TypePageOut, ipc.PageOut{Mapping: m.id, Size: m.size})
		}
	}
	return nil
}

// inFlight keeps descriptors in sockets that nobody reads: half of what the kernel lets one user have, for with all of it no other process of the same user can send any, the pager of this
// test among them.
func inFlight(v *villain) error {
	fds := make([]int, 253)
	for i := range fds {
		fds[i] = v.fd.Fd()
	}
	oob := unix.UnixRights(fds...)
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return err
	}
	sent, most := 0, int(r.Cur/2)
	for end := time.Now().Add(v.limit); time.Now().Before(end) && sent < most; {
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			break // no more descriptors of its own
		}
		for err == nil && sent < most {
			if err = unix.Sendmsg(p[0], []byte("x"), oob, nil, 0); err == nil {
				sent += len(fds)
			}
		}
		if errors.Is(err, unix.ETOOMANYREFS) {
			break
		}
	}
	v.say(fmt.Sprintf("%d descriptors in flight", sent))
	return nil
}

// forks has children that inherit the mapping, unregistered, and write to it.
func forks(v *villain) error {
	m, err := v.mapObject(4 << 20)
	if err != nil {
		return err
	}
	m.write()
	b := m.bytes()
	for end := time.Now().Add(v.limit); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		pid, errno := forkAndWrite(b)
		if errno != 0 {
			return fmt.Errorf("fork: %w", errno)
		}
		go v.do(ipc.TypePageOut, ipc.PageOut{Mapping: m.id, Size: m.size})
		for p := 0; p < len(b); p += 4096 {
			try(func() { b[p]++ })
		}
		unix.Wait4(pid, nil, 0, nil)
	}
	return nil
}

// forkAndWrite is fork(2); the child has one thread and no Go runtime to speak of: it touches memory, and ends.
//
//go:norace
//go:noinline
func forkAndWrite(b []byte) (pid int, errno unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if n != 0 || e != 0 {
		return int(n), e
	}
	for p := 0; p < len(b); p += 4096 {
		b[p]++
	}
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
}

// execs has tasks that execute another program while their threads fault.
func execs(v *villain) error {
	for end := time.Now().Add(v.limit); time.Now().Before(end); {
		cmd := exec.Command("/proc/self/exe", v.socket)
		cmd.Args[0] = argv0 + "villain that execs"
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			return err
		}
	}
	return nil
}

func execTask(*conn) error {
	v, err := newVillain(os.Args[1], uffd.RequiredFeatures)
	if err != nil {
		return err
	}
	m, err := v.mapObject(8 << 20)
	if err != nil {
		return err
	}
	for i := range int64(8) {
		go func() {
			for p := i * 4096; ; p = (p + 8*4096) % m.size {
				m.bytes()[p]++
			}
		}()
	}
	time.Sleep(50 * time.Millisecond)
	unix.FcntlInt(uintptr(m.file), unix.F_SETFD, 0) // the file goes with it
	return unix.Exec("/bin/sleep", []string{"sleep", "0.1"}, nil)
}

// registersAgain takes its memory off the userfaultfd and puts it back, with other modes, and on another userfaultfd, while its threads fault.
func registersAgain(v *villain) error {
	m, err := v.mapObject(4 << 20)
	if err != nil {
		return err
	}
	other, err := uffd.Open(&uffd.OpenOptions{Features: uffd.RequiredFeatures})
	if err != nil {
		return err
	}
	end := time.Now().Add(v.limit)
	for i := range int64(4) {
		go func() {
			for p := i * 4096; time.Now().Before(end); p = (p + 4*4096) % m.size {
				try(func() { m.bytes()[p]++ })
			}
		}()
	}
	modes := []uffd.RegisterMode{uffd.RegisterMissing, uffd.RegisterMinor, uffd.RegisterMissing | uffd.RegisterWP, uffd.RegisterMissing | uffd.RegisterMinor | uffd.RegisterWP}
	for i := 0; time.Now().Before(end); i++ {
		v.fd.Unregister(m.addr, uint64(m.size))
		if i%8 == 0 {
			other.Register(m.addr, uint64(m.size)/2, uffd.RegisterMissing)
			other.Unregister(m.addr, uint64(m.size)/2)
		}
		v.fd.Register(m.addr, uint64(m.size), modes[i%len(modes)])
		go v.do(ipc.TypePageOut, ipc.PageOut{Mapping: m.id, Size: m.size})
		time.Sleep(time.Duration(rand.Int64N(int64(time.Millisecond))))
	}
	v.fd.Unregister(m.addr, uint64(m.size)) // who waits there still is let go
	return nil
}

// strangeFiles hands files to the manager of files that are none: what the kernel makes up, what would block, what changes under it, what can be written only at its end.
func strangeFiles(v *villain) error {
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "file")
	if err := os.WriteFile(name, make([]byte, 8192), 0o600); err != nil {
		return err
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		return err
	}
	for _, f := range []struct {
		path  string
		flags int
	}{
		{"/proc/self/mem", unix.O_RDWR}, {"/proc/self/oom_score_adj", unix.O_RDWR}, {"/proc/self/environ", unix.O_RDONLY}, {"/proc/sys/kernel/core_pattern", unix.O_RDONLY},
		{"/sys/kernel/mm/transparent_hugepage/enabled", unix.O_RDONLY}, {fifo, unix.O_RDWR}, {"/dev/zero", unix.O_RDWR}, {dir, unix.O_RDONLY},
		{name, unix.O_PATH}, {name, unix.O_RDWR | unix.O_APPEND}, {name, unix.O_WRONLY}, {name, unix.O_RDWR | unix.O_DIRECT},
	} {
		fd, err := unix.Open(f.path, f.flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if errors.Is(err, unix.EINVAL) && f.flags&unix.O_DIRECT != 0 {
			continue // not on this file system
		}
		if err != nil {
			return fmt.Errorf("open %s: %w", f.path, err)
		}
		m, err := v.overFile(8192, fd)
		unix.Close(fd)
		if err == nil {
			m.Close()
			return fmt.Errorf("%s, opened with %#x, became an object", f.path, f.flags)
		}
		v.say(err.Error())
	}
	// A memory file that is sealed once it has become an object: what is dirty can never be stored.
	mem, err := unix.MemfdCreate("villain", unix.MFD_ALLOW_SEALING|unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	if err := unix.Ftruncate(mem, 8<<20); err != nil {
		return err
	}
	r, err := v.overFile(8<<20, mem)
	if err != nil {
		return err
	}
	o, _, err := ipc.Decode[ipc.ObjectReply](r.Body)
	r.Close()
	if err != nil {
		return err
	}
	m, err := v.prepare(o.Handle, 8<<20)
	if err != nil {
		return err
	}
	if err := v.do(ipc.TypeMapReady, ipc.MapReady{Mapping: m.id, Address: m.addr}); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(uintptr(mem), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return err
	}
	for end := time.Now().Add(v.limit); time.Now().Before(end); {
		for p := int64(0); p < m.size && time.Now().Before(end); p += 4096 {
			try(func() { m.bytes()[p]++ })
		}
		v.do(ipc.TypePageOut, ipc.PageOut{Mapping: m.id, Size: m.size})
	}
	return nil
}

// leavesWithoutEnd connects, maps, and closes its socket, as often as it can, and keeps all memory: the guardian has to answer for each.
func leavesWithoutEnd(v *villain) error {
	n := 0
	for end := time.Now().Add(v.limit); time.Now().Before(end); n++ {
		w, err := newVillain(v.socket, uffd.RequiredFeatures)
		if err != nil {
			break // no more descriptors of its own, or of the pager's
		}
		if _, err := w.mapObject(1 << 20); err != nil {
			return err
		}
		w.l.Close()
		keep(w)
	}
	v.say(fmt.Sprintf("left %d times", n))
	return nil
}

// overFile makes an object of 8 KiB or more over a file.
func (v *villain) overFile(size int64, fd int) (*ipc.Message, error) {
	tail, err := ipc.AppendStrings(nil, "file", "")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return v.l.Call(ctx, ipc.TypeObjectCreate, ipc.ObjectCreate{Size: size}, &ipc.CallOptions{Tail: tail, FDs: []int{fd}})
}
