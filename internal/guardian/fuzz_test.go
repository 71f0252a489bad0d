package guardian

import (
	"log/slog"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
)

// FuzzItems has a pager say whatever it likes to its guardian, with file descriptors of some kinds: it holds them or refuses, and has nothing left at the end.
func FuzzItems(f *testing.F) {
	f.Add(uint16(ipc.TypePut), uint32(ipc.ItemArena), uint64(1), uint64(0), uint64(0), uint64(0), []byte("tail"), uint8(1))
	f.Add(uint16(ipc.TypePut), uint32(ipc.ItemTask), uint64(1), uint64(0), uint64(0), uint64(0), []byte(nil), uint8(2))
	f.Add(uint16(ipc.TypePut), uint32(ipc.ItemRange), uint64(2), uint64(1), uint64(0x1000), uint64(1<<63), []byte(nil), uint8(0))
	f.Add(uint16(ipc.TypePut), uint32(ipc.ItemEnd), uint64(1), uint64(0), uint64(0), uint64(0), []byte(nil), uint8(0))
	f.Add(uint16(ipc.TypeDrop), uint32(ipc.ItemTask), uint64(1), uint64(0), uint64(0), uint64(0), []byte(nil), uint8(0))
	f.Add(uint16(ipc.TypeResize), uint32(1), uint64(1), uint64(0), uint64(0), uint64(0), []byte(nil), uint8(1))
	f.Fuzz(func(t *testing.T, typ uint16, kind uint32, id, parent, a, b uint64, tail []byte, fds uint8) {
		if len(tail) > ipc.MaxBody-64 || ipc.Type(typ) == ipc.TypeReplace { // an upgrade needs more of a guardian than is here
			return
		}
		before, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		s := &supervisor{Options: Options{Log: slog.New(slog.DiscardHandler)}, table: newTable(slog.New(slog.DiscardHandler))}
		conn, file, err := ipc.Pair()
		if err != nil {
			t.Fatal(err)
		}
		link := ipc.NewLink(conn, &ipc.LinkOptions{Handler: s.handler(serving())})
		theirs, err := ipc.FileConn(file)
		if err != nil {
			t.Fatal(err)
		}
		mem, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var body []byte
		switch ipc.Type(typ) {
		case ipc.TypePut:
			body, err = ipc.AppendFixed(nil, ipc.Put{Kind: ipc.ItemKind(kind), ID: id, Parent: parent, A: a, B: b})
		case ipc.TypeDrop:
			body, err = ipc.AppendFixed(nil, ipc.Drop{Kind: ipc.ItemKind(kind), ID: id})
		case ipc.TypeResize:
			body, err = ipc.AppendFixed(nil, ipc.Resize{Size: int64(id)})
		}
		if err != nil {
			t.Fatal(err)
		}
		// What the guardian knows: a session's socket, and now and then a userfaultfd that is none.
		list := [][]int{nil, {mem}, {sock}, {mem, sock}}[fds%4]
		for seq := range uint32(2) { // the second replaces the first
			if err := theirs.Send(t.Context(), ipc.Header{Type: ipc.Type(typ), Seq: seq + 1}, append(body, tail...), list...); err != nil {
				break
			}
		}
		unix.Close(mem)
		unix.Close(sock)
		theirs.Close()
		file.Close()
		<-link.Done()
		link.Close()
		s.table.endAll()
		if n := s.table.tasks(); n != 0 {
			t.Fatalf("%d tasks are left", n)
		}
		if after, err := os.ReadDir("/proc/self/fd"); err != nil || len(after) > len(before) {
			t.Fatalf("%d fds open, %d before; %v", len(after), len(before), err)
		}
	})
}
