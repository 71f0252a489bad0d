//go:build ignore

// Skips reads the output of go test -json, prints what go test would have printed, and then lists the tests that were skipped. It ends with
// status 1 if a skip gives any other reason than a kernel that is older than the feature under test: such a message begins with
// "kernel older than".
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"sort"
	"strings"
)

// event is one line of go test -json (go doc test2json).
type event struct {
	Action, Package, Test, Output string
}

var (
	// frame lines stand around each test's output; go test prints them only under -v.
	frame = regexp.MustCompile(`^\s*(=== (RUN|PAUSE|CONT|NAME) |--- (PASS|SKIP): )`)
	// where a message of t.Skip and t.Log begins.
	where  = regexp.MustCompile(`^\s*[\w.-]+\.go:\d+: `)
	reason = "kernel older than"
)

func main() {
	output := map[string][]string{} // of each test under way
	var skips []string
	failed, bad := false, false

	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			break
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			os.Stdout.Write(line) // not from test2json: an error of the build
			continue
		}
		id := e.Package + "." + e.Test
		switch e.Action {
		case "output", "build-output":
			switch {
			case e.Test == "" && e.Output == "PASS\n":
			case e.Test == "":
				fmt.Print(e.Output)
			case !frame.MatchString(e.Output):
				output[id] = append(output[id], e.Output)
			}
		case "pass":
			delete(output, id)
		case "fail":
			failed = true
			for _, s := range output[id] {
				fmt.Print(s)
			}
			delete(output, id)
		case "skip":
			if e.Test == "" { // no test files
				continue
			}
			why := strings.TrimSpace(where.ReplaceAllString(strings.Join(output[id], ""), ""))
			ok := strings.HasPrefix(why, reason)
			bad = bad || !ok
			skips = append(skips, fmt.Sprintf("SKIP %s: %s", id, why))
			delete(output, id)
		}
	}
	// What a test said that never ended: the stacks of a hang.
	for _, lines := range output {
		for _, s := range lines {
			fmt.Print(s)
		}
	}
	sort.Strings(skips)
	for _, s := range skips {
		fmt.Println(s)
	}
	if bad {
		fmt.Printf("FAIL: a test was skipped; only %q is a reason\n", reason)
	}
	if failed || bad {
		os.Exit(1)
	}
}
