//go:build linux

package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func readDoc(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../..", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// section is the part of a document below a heading.
func section(t *testing.T, doc, heading string) string {
	t.Helper()
	_, s, ok := strings.Cut(doc, "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("there is no section %q", heading)
	}
	s, _, _ = strings.Cut(s, "\n## ")
	return s
}

// TestDocumentedMessages holds the table of log messages against the program: whoever has an alert on a message must not wait for one that was renamed.
func TestDocumentedMessages(t *testing.T) {
	var literals []string
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (strings.HasPrefix(d.Name(), ".") && d.Name() != ".." || d.Name() == "contrib" || d.Name() == "testdata"):
			return filepath.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
				if s, err := strconv.Unquote(l.Value); err == nil {
					literals = append(literals, s)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	messages := 0
	for line := range strings.Lines(section(t, readDoc(t, "docs/operations.md"), "What the log says")) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 {
			continue
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
			messages++
			// What is different each time is written as three dots.
			first, rest, _ := strings.Cut(m[1], "...")
			if !slices.ContainsFunc(literals, func(l string) bool {
				_, after, ok := strings.Cut(l, first)
				return ok && strings.Contains(after, rest)
			}) {
				t.Errorf("nothing says %q", m[1])
			}
		}
	}
	if messages < 10 {
		t.Errorf("the table has %d messages: it was not found", messages)
	}
}

// TestDocumentedStatuses holds the table of exit statuses against those that there are.
func TestDocumentedStatuses(t *testing.T) {
	var got []int
	for _, m := range regexp.MustCompile(`(?m)^\| (\d+) \|`).FindAllStringSubmatch(section(t, readDoc(t, "docs/operations.md"), "Exit status"), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, n)
	}
	if want := []int{0, exitFailed, exitUsage, exitNoPager, exitRefused, exitDiffers}; !slices.Equal(got, want) {
		t.Errorf("the table has %v, there are %v", got, want)
	}
}

// foreign are flags of other programs that the documents speak of.
var foreign = []string{"now", "cap-add", "device", "ulimit", "name", "user", "group-add", "sparse"}

// TestDocumentedFlags holds the flags in the documents against those that there are, and what the documents call the command with.
func TestDocumentedFlags(t *testing.T) {
	commands := map[string]*cobra.Command{}
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		c.InitDefaultHelpFlag()
		commands[c.CommandPath()] = c
		for _, s := range c.Commands() {
			walk(s)
		}
	}
	walk(newRoot())
	known := func(flag string) bool {
		for _, c := range commands {
			if c.Flags().Lookup(flag) != nil {
				return true
			}
		}
		return slices.Contains(foreign, flag)
	}
	for _, name := range []string{"README.md", "docs/operations.md", "docs/security.md", "docs/deadlocks.md", "docs/design.md", "docs/policy.md", "docs/benchmarks.md"} {
		doc := readDoc(t, name)
		for _, m := range regexp.MustCompile(`(?:^|[\s(\x60,])--([a-z][a-z-]*)`).FindAllStringSubmatch(doc, -1) {
			if !known(m[1]) {
				t.Errorf("%s: no command has --%s", name, m[1])
			}
		}
		for _, m := range regexp.MustCompile("`machpager ([a-z]+)(?: ([a-z]+))?").FindAllStringSubmatch(doc, -1) {
			if path := fmt.Sprintf("machpager %s", m[1]); commands[path] == nil || m[2] != "" && slices.Contains([]string{"paging", "debug", "demo", "bench"}, m[1]) && commands[path+" "+m[2]] == nil {
				t.Errorf("%s: there is no %s %s", name, path, m[2])
			}
		}
	}
}
