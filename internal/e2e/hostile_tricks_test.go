package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/uffd"
)

func init() {
	attacks["odd userfaultfds"] = oddUserfaultfds
	attacks["tricks"] = tricks
}

// handOver connects and hands over a userfaultfd, whatever it is.
func handOver(socket string, fd int) (*ipc.Link, error) {
	conn, err := ipc.DialConn(context.Background(), socket)
	if err != nil {
		return nil, err
	}
	v := &villain{l: ipc.NewLink(conn, nil)}
	if err = v.do(ipc.TypeHello, ipc.Hello{}); err == nil {
		err = v.do(ipc.TypeTaskUffd, ipc.TaskUffd{Features: uint64(uffd.RequiredFeatures)}, fd)
	}
	if err != nil {
		v.l.Close()
		return nil, err
	}
	return v.l, nil
}

// oddUserfaultfds hands over userfaultfds that the kernel does not let anybody use: one that was never initialised, and such whose address space is another process's, and gone.
func oddUserfaultfds(v *villain) error {
	raw, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return fmt.Errorf("userfaultfd: %w", errno)
	}
	defer unix.Close(int(raw))
	if l, err := handOver(v.socket, int(raw)); err == nil {
		l.Close()
		return errors.New("a userfaultfd without UFFDIO_API became a task's")
	} else if errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	for end := time.Now().Add(v.limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		api := [3]uint64{0xaa, uint64(uffd.RequiredFeatures)}
		pid, errno := forkAndOpen(&api)
		if errno != 0 {
			return fmt.Errorf("fork: %w", errno)
		}
		var status unix.WaitStatus
		if _, err := unix.Wait4(pid, &status, 0, nil); err != nil {
			return err
		}
		fd := status.ExitStatus() // descriptors are few here: it fits
		if fd <= 0 {
			return fmt.Errorf("the child has made no userfaultfd: status %#x", status)
		}
		l, err := handOver(v.socket, fd)
		unix.Close(fd)
		if errors.Is(err, context.DeadlineExceeded) {
			return err
		} else if err != nil {
			continue // it need not be accepted
		}
		w := &villain{socket: v.socket, l: l, fd: v.fd} // registered with a userfaultfd of the living: what is claimed is there, and not the dead one's
		h, err := w.object(1 << 20)
		if err != nil {
			return err
		}
		m, err := w.prepare(h, 1<<20)
		if err != nil {
			return err
		}
		if err := w.do(ipc.TypeMapReady, ipc.MapReady{Mapping: m.id, Address: m.addr}); err == nil {
			return errors.New("memory of a process that is gone is ready to be served")
		} else if errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		for typ, body := range map[ipc.Type]any{ipc.TypePageOut: ipc.PageOut{Mapping: m.id, Size: m.size}, ipc.TypeDiscard: ipc.Discard{Mapping: m.id, Size: m.size},
			ipc.TypeUnmap: ipc.Unmap{Mapping: m.id}} {
			if err := w.answered(typ, body); err != nil {
				return err
			}
		}
		v.fd.Unregister(m.addr, uint64(m.size))
		unix.MunmapPtr(pointer(m.addr), uintptr(m.size))
		unix.Close(m.file)
		l.Close()
	}
	return nil
}

// forkAndOpen is fork(2), but for the table of descriptors, which the child shares. The child makes a userfaultfd with the features of api, and ends: the
// descriptor stays, its address space does not. It is told in the child's exit status.
//
//go:norace
//go:noinline
func forkAndOpen(api *[3]uint64) (pid int, errno unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.CLONE_FILES)|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if n != 0 || e != 0 {
		return int(n), e
	}
	fd, _, e := unix.RawSyscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if e == 0 {
		_, _, e = unix.RawSyscall(unix.SYS_IOCTL, fd, uffdioAPI, uintptr(unsafe.Pointer(api)))
	}
	if e != 0 {
		fd = 0
	}
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, fd, 0, 0)
	}
}

// uffdioAPI is UFFDIO_API of ioctl_userfaultfd(2).
const uffdioAPI = 0xc018aa3f

// tricks does, as a user of no privileges, all that could be done with the file of an object and with the processes of the pager and is the owner's alone; and what is anybody's
// with a file that is open, which must not keep the pager from its work.
func tricks(v *villain) error {
	m, err := v.mapObject(4 << 20)
	if err != nil {
		return err
	}
	m.write()
	reply, err := v.call(ipc.TypeInfo, ipc.Empty{})
	if err != nil {
		return err
	}
	info, _, err := ipc.Decode[ipc.InfoReply](reply.Body)
	reply.Close()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		return err
	}
	for _, err := range []error{syscall.Setgroups(nil), syscall.Setgid(nobody), syscall.Setuid(nobody), unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0)} {
		if err != nil {
			return fmt.Errorf("become nobody: %w", err)
		}
	}
	self := fmt.Sprintf("/proc/self/fd/%d", m.file)
	reopen := func(path string, flags int) error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	if err := reopen("/proc/self/maps", unix.O_RDONLY); err != nil {
		return err // then the others would say nothing
	}
	immutable := uint32(0x10) // FS_IMMUTABLE_FL
	refused := map[string]error{
		"open the file anew":          reopen(self, unix.O_RDWR),
		"open the file anew, to read": reopen(self, unix.O_RDONLY),
		"open what is mapped":         reopen(fmt.Sprintf("/proc/self/map_files/%x-%x", m.addr, m.addr+uint64(m.size)), unix.O_RDWR),
		"fchmod":                      unix.Fchmod(m.file, 0o666),
		"fchown":                      unix.Fchown(m.file, nobody, nobody),
		"a lease":                     fcntl(m.file, unix.F_SETLEASE, unix.F_WRLCK),
		"seals":                       fcntl(m.file, unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE),
		"an extended attribute":       unix.Fsetxattr(m.file, "user.machpager", make([]byte, 4096), 0),
		"immutable":                   ioctl(m.file, unix.FS_IOC_SETFLAGS, unsafe.Pointer(&immutable)),
		"a name":                      unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, filepath.Join(dir, "name"), unix.AT_SYMLINK_FOLLOW),
		"the directory of the file":   func() error { _, err := unix.Openat(m.file, "..", unix.O_RDONLY, 0); return err }(),
	}
	for who, pid := range map[string]int{"pager": int(info.PagerPID), "guardian": int(info.GuardianPID)} {
		proc := fmt.Sprintf("/proc/%d/", pid)
		for _, name := range []string{"mem", "maps", "environ", "fd/0", "fd/3", "fdinfo/3", "pagemap", "ns/mnt", "root", "stack", "syscall"} {
			refused[name+" of the "+who] = reopen(proc+name, unix.O_RDONLY)
		}
		for _, name := range []string{"comm", "oom_score_adj", "clear_refs"} {
			refused["write "+name+" of the "+who] = reopen(proc+name, unix.O_WRONLY)
		}
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return err
		}
		_, taken := unix.PidfdGetfd(pidfd, 3, 0)
		refused["a descriptor of the "+who] = taken
		refused["a signal to the "+who] = unix.PidfdSendSignal(pidfd, unix.SIGUSR1, nil, 0)
		unix.Close(pidfd)
		refused["ptrace of the "+who] = unix.PtraceSeize(pid)
		refused["limits of the "+who] = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{}, nil)
		refused["nice of the "+who] = unix.Setpriority(unix.PRIO_PROCESS, pid, 19)
		refused["affinity of the "+who] = unix.SchedSetaffinity(pid, &unix.CPUSet{1})
	}
	for what, err := range refused {
		if err == nil {
			return fmt.Errorf("nobody may have %s", what)
		}
	}

	// What the kernel lets anybody do who has the file open.
	unix.Flock(m.file, unix.LOCK_EX|unix.LOCK_NB)
	unix.FcntlFlock(uintptr(m.file), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	fcntl(m.file, unix.F_SETOWN, int(info.PagerPID))
	fcntl(m.file, unix.F_SETSIG, int(unix.SIGKILL))
	fcntl(m.file, unix.F_SETFL, unix.O_APPEND|unix.O_NONBLOCK|unix.O_ASYNC)
	fcntl(m.file, unix.F_SET_RW_HINT, 5)
	unix.Seek(m.file, 1<<40, unix.SEEK_SET)
	private, err := unix.MmapPtr(m.file, 0, nil, uintptr(m.size), unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE)
	if err == nil {
		p := unsafe.Slice((*byte)(private), m.size)
		for i := int64(0); i < m.size; i += 4096 {
			try(func() { p[i]++ })
		}
	}
	for end := time.Now().Add(v.limit); time.Now().Before(end); {
		unix.Fallocate(m.file, unix.FALLOC_FL_KEEP_SIZE, m.size, 1<<30)
		// Pages in pipes: the kernel holds them, and they are in no file.
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err == nil {
			fcntl(p[1], unix.F_SETPIPE_SZ, 1<<20)
			off := int64(0)
			unix.Splice(m.file, &off, p[1], nil, 1<<20, unix.SPLICE_F_NONBLOCK)
		}
		try(m.write)
		if err := v.answered(ipc.TypePageOut, ipc.PageOut{Mapping: m.id, Size: m.size}); err != nil {
			return err
		}
	}
	return nil
}

func fcntl(fd, cmd, arg int) error {
	_, err := unix.FcntlInt(uintptr(fd), cmd, arg)
	return err
}

func ioctl(fd int, req uint, p unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(p)); errno != 0 {
		return errno
	}
	return nil
}
