//go:build linux

package spawn

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// words takes what the children write to their standard error: records of slog as JSON, and plain lines (panics, what managers print).
type words struct {
	log *slog.Logger // immutable; nil: discard

	mu    sync.Mutex
	tail  []string // guarded by mu; the last lines that matter
	bytes int      // guarded by mu; in tail
}

// tailMost bounds the last words, in bytes.
const tailMost = 4 << 10

// read reads lines until the children have closed their end. It never stops reading: a full pipe would lose words.
func (w *words) read(r io.Reader) {
	b := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := b.ReadSlice('\n') // longer lines come in pieces
		if len(line) > 0 {
			w.line(strings.TrimRight(string(line), "\n"))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

func (w *words) line(s string) {
	if strings.HasPrefix(s, "{") {
		if r, ok := parseRecord(s); ok {
			if r.Level >= slog.LevelError {
				w.keep(r.Message + attrText(r))
			}
			if w.log != nil && w.log.Enabled(context.Background(), r.Level) {
				w.log.Handler().Handle(context.Background(), r)
			}
			return
		}
	}
	w.keep(s)
	if w.log != nil {
		w.log.Error("pager: " + s)
	}
}

func (w *words) keep(s string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tail = append(w.tail, s)
	w.bytes += len(s)
	for w.bytes > tailMost && len(w.tail) > 1 {
		w.bytes -= len(w.tail[0])
		w.tail = w.tail[1:]
	}
}

// last is the last words, one line.
func (w *words) last() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.tail, "; ")
}

// parseRecord reads what slog.JSONHandler wrote.
func parseRecord(s string) (slog.Record, bool) {
	var m map[string]any
	if json.Unmarshal([]byte(s), &m) != nil {
		return slog.Record{}, false
	}
	msg, ok := m[slog.MessageKey].(string)
	name, _ := m[slog.LevelKey].(string)
	var level slog.Level
	if !ok || level.UnmarshalText([]byte(name)) != nil {
		return slog.Record{}, false
	}
	at := time.Now()
	if text, ok := m[slog.TimeKey].(string); ok {
		if t, err := time.Parse(time.RFC3339Nano, text); err == nil {
			at = t
		}
	}
	r := slog.NewRecord(at, level, msg, 0)
	keys := make([]string, 0, len(m))
	for k := range m {
		if k != slog.MessageKey && k != slog.LevelKey && k != slog.TimeKey {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		r.AddAttrs(slog.Any(k, m[k]))
	}
	return r, true
}

func attrText(r slog.Record) string {
	var b strings.Builder
	r.Attrs(func(a slog.Attr) bool {
		b.WriteString(" " + a.String())
		return true
	})
	return b.String()
}
