//go:build linux

package spawn

import (
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"machpager/internal/daemon"
)

// FuzzHello: what is read from a greeting is what would be written of it.
func FuzzHello(f *testing.F) {
	good, err := hello{Version: helloVersion, Role: rolePager, Config: daemon.Config{Resident: 1 << 20, Dir: "/tmp"}, JSON: true}.packet()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(good[len(helloMagic):]))
	f.Add("{}")
	f.Add(`{"Version":-1,"Role":"machpager-pager","Config":null}`)
	f.Fuzz(func(t *testing.T, text string) {
		h, err := parseHello([]byte(string(helloMagic)+text), rolePager)
		if err != nil {
			return
		}
		if h.Version != helloVersion || h.Role != rolePager {
			t.Fatalf("took %+v", h)
		}
		b, err := h.packet()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseHello(b, rolePager); err != nil || !reflect.DeepEqual(again, h) {
			t.Fatalf("%+v and then %+v, %v", h, again, err)
		}
	})
}

// FuzzWords: whatever the children write, nothing is lost of a plain line, and the last words stay bounded.
func FuzzWords(f *testing.F) {
	f.Add(`{"time":"2026-01-02T03:04:05Z","level":"ERROR","msg":"words","n":1,"deep":{"a":[null]}}`)
	f.Add("panic: plain words\n\ngoroutine 1 [running]:\n")
	f.Add(strings.Repeat("x", 3*tailMost))
	f.Fuzz(func(t *testing.T, text string) {
		w := &words{log: slog.New(slog.DiscardHandler)}
		w.read(strings.NewReader(text))
		if n := len(w.last()); n > tailMost+64<<10 {
			t.Fatalf("%d bytes of last words", n)
		}
		lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
		last := lines[len(lines)-1]
		if last != "" && len(last) < 1000 && !strings.HasPrefix(last, "{") && !strings.HasSuffix(w.last(), strings.TrimRight(last, "\n")) {
			t.Fatalf("%q does not end with %q", w.last(), last)
		}
	})
}
