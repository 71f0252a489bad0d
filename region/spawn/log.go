//go:build linux

package spawn

import (
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

// newLog logs to standard error without ever waiting for whoever reads it: what finds the queue full is dropped and counted. flush waits a moment
// for what is queued.
func newLog(asJSON bool, level slog.Level) (log *slog.Logger, flush func()) {
	q := &logQueue{lines: make(chan []byte, 1024)}
	go q.write()
	o := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(q, o)
	if asJSON {
		h = slog.NewJSONHandler(q, o)
	}
	return slog.New(h), q.flush
}

type logQueue struct {
	lines   chan []byte
	dropped atomic.Int64
}

// lineMost is what goes into a pipe whole or not at all (PIPE_BUF), in bytes.
const lineMost = 4096

// Write takes one line.
func (q *logQueue) Write(b []byte) (int, error) {
	line := append([]byte(nil), b...)
	if len(line) > lineMost {
		line = append(line[:lineMost-1], '\n')
	}
	select {
	case q.lines <- line:
	default:
		q.dropped.Add(1)
	}
	return len(b), nil
}

func (q *logQueue) write() {
	for line := range q.lines {
		if line == nil {
			return
		}
		if n := q.dropped.Swap(0); n > 0 {
			fmt.Fprintf(os.Stderr, "%d lines of the log were dropped\n", n)
		}
		os.Stderr.Write(line)
	}
}

func (q *logQueue) flush() {
	limit := time.After(200 * time.Millisecond)
	for len(q.lines) > 0 {
		select {
		case <-limit:
			return
		case <-time.After(time.Millisecond):
		}
	}
	time.Sleep(time.Millisecond) // the last line is on its way
}
