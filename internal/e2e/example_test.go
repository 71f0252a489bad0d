package e2e

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"os"
	"strings"
	"testing"

	"machpager/region/spawn"
)

// Example is the program of the README. Its TestMain has called spawn.Main.
func Example() {
	ctx := context.Background()
	pager, err := spawn.Start(ctx, &spawn.Options{Resident: 64 << 20})
	if err != nil {
		log.Fatal(err)
	}
	defer pager.Close()
	memory, err := pager.Allocate(ctx, 1<<30, nil) // 1 GiB, and not a page of it is there
	if err != nil {
		log.Fatal(err)
	}
	hello := memory.Bytes()[512<<20:][:5]
	copy(hello, "hello")                                  // a page fault, answered with zeros
	if err := memory.PageOut(ctx, 0, 1<<30); err != nil { // into the pager's store
		log.Fatal(err)
	}
	text := string(hello) // another fault, answered from the store
	fmt.Printf("%s, %d page from the store\n", text, memory.Stats().Stored)
	// Output: hello, 1 page from the store
}

// TestReadmeExample holds the README's program against Example.
func TestReadmeExample(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	this, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ := bytes.Cut(this, []byte("func Example() {\n"))
	body, _, ok := bytes.Cut(body, []byte("\t// Output:"))
	if !ok {
		t.Fatal("no Example")
	}
	_, program, _ := strings.Cut(string(readme), "```go\n")
	program, _, _ = strings.Cut(program, "```")
	if !strings.Contains(program, string(body)) {
		t.Errorf("the README's program is not Example: want in it\n%s", body)
	}
	if n := strings.Count(string(body), "\n"); n > 20 {
		t.Errorf("the example has %d lines", n)
	}
}
