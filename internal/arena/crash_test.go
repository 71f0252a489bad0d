package arena

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	crashChild = "arena-test-writer" // argv[0]
	crashMax   = 1 << 30
)

func TestMain(m *testing.M) {
	if os.Args[0] == crashChild {
		writeUntilKilled()
	}
	os.Exit(m.Run())
}

// writeUntilKilled appends: it grows when it must, writes an entry, and commits it by the count in word 0.
func writeUntilKilled() {
	a, err := Open(os.NewFile(3, "arena"), kind, version, crashMax)
	if err != nil {
		panic(err)
	}
	if a.Size() == 0 {
		if err := a.Grow(1); err != nil {
			panic(err)
		}
	}
	os.Stdout.Write([]byte{1})
	for {
		n := a.Words()[0].Load()
		if end := int64(n+2) * 8; end > a.Size() {
			if err := a.Grow(end); err != nil {
				panic(err)
			}
		}
		a.Words()[n+1].Store(^n)
		a.Words()[0].Store(n + 1)
	}
}

// A writer killed at any instruction leaves an arena that opens, and every committed entry is in it.
func TestKilledWriter(t *testing.T) {
	a := newArena(t, crashMax)
	file := dup(t, a.File())
	must(t, a.Close())
	var before uint64
	for round := range 25 {
		r, w, err := os.Pipe()
		must(t, err)
		cmd := exec.Cmd{Path: "/proc/self/exe", Args: []string{crashChild}, Stdout: w, Stderr: os.Stderr, ExtraFiles: []*os.File{file}}
		must(t, cmd.Start())
		w.Close()
		must(t, r.SetReadDeadline(time.Now().Add(20*time.Second)))
		if _, err := r.Read(make([]byte, 1)); err != nil { // it has begun
			cmd.Process.Kill()
			t.Fatal(err)
		}
		time.Sleep(time.Duration(round) * 130 * time.Microsecond)
		must(t, cmd.Process.Kill())
		cmd.Wait()
		r.Close()

		b, err := Open(dup(t, file), kind, version, crashMax)
		must(t, err)
		words := b.Words()
		count := words[0].Load()
		if count < before || count+1 > uint64(len(words)) {
			t.Fatalf("round %d: %d entries, before %d, in %d words", round, count, before, len(words))
		}
		for i := range count {
			if got := words[i+1].Load(); got != ^i {
				t.Fatalf("round %d: entry %d of %d is %#x", round, i, count, got)
			}
		}
		var st unix.Stat_t
		must(t, unix.Fstat(int(b.File().Fd()), &st))
		if b.Size() > st.Size-PageSize {
			t.Fatalf("round %d: %d bytes committed, %d in the file", round, b.Size(), st.Size)
		}
		before = count
		must(t, b.Close())
	}
	if before == 0 {
		t.Fatal("no entry was ever committed")
	}
	t.Logf("%d entries", before)
}
