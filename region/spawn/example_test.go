package spawn_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"

	"machpager/pager/emm"
	"machpager/pager/vnode"
	"machpager/region"
	"machpager/region/spawn"
)

// An object over a file: the file's contents as memory, read when they are touched. Sync brings changes back.
func ExampleStart_file() {
	ctx := context.Background()
	pager, err := spawn.Start(ctx, nil) // TestMain has called spawn.Main
	if err != nil {
		log.Fatal(err)
	}
	defer pager.Close()

	f, err := os.CreateTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	fmt.Fprint(f, "pages come from a file and go back to it")

	object, err := pager.ObjectCreate(ctx, 0, &region.ObjectOptions{Manager: "file", File: f}) // 0: as large as the file
	if err != nil {
		log.Fatal(err)
	}
	memory, err := object.Map(ctx, nil)
	if err != nil {
		log.Fatal(err)
	}
	b := memory.Bytes()
	copy(b, bytes.ToUpper(b[:5]))                              // the first touch is a read of the file
	if err := memory.Sync(ctx, 0, int64(len(b))); err != nil { // written, and on the disk
		log.Fatal(err)
	}
	contents, err := os.ReadFile(f.Name())
	fmt.Println(string(contents), err)
	// Output: PAGES come from a file and go back to it <nil>
}

// countdown is an io.ReaderAt: lines with numbers, from the one that it is down to 1.
type countdown int

func (c countdown) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		line, column := (off+int64(i))/8, (off+int64(i))%8
		p[i] = fmt.Sprintf("%7d\n", int64(c)-line)[column]
	}
	return len(p), nil
}

// countdownManager is a memory manager of this program's own, made of an io.ReaderAt. It runs in the pager's process: TestMain calls
// spawn.Main(managers...).
var countdownManager = spawn.Manager{Name: "countdown", Open: func(_ context.Context, arg string, _ *os.File) (emm.Manager, error) {
	n, err := strconv.Atoi(arg)
	if err != nil {
		return nil, err
	}
	return vnode.ReaderAt(countdown(n), 8*int64(n), nil), nil
}}

func init() { managers = append(managers, countdownManager) }

// An object over an io.ReaderAt of the program's own: what is never touched is never computed.
func ExampleMain_readerAt() {
	ctx := context.Background()
	pager, err := spawn.Start(ctx, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer pager.Close()

	object, err := pager.ObjectCreate(ctx, 8*1_000_000, &region.ObjectOptions{Manager: "countdown", Arg: "1000000"})
	if err != nil {
		log.Fatal(err)
	}
	memory, err := object.Map(ctx, &region.MapOptions{ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	text := memory.Bytes()
	fmt.Println(strings.Fields(string(text[:16])), strings.Fields(string(text[len(text)-16:])))
	// Output: [1000000 999999] [2 1]
}
