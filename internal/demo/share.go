//go:build linux

package demo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

// ErrDiffers says that a hash is not the file's.
var ErrDiffers = errors.New("the contents differ")

// ShareOptions for Share. nil and zero values mean the defaults.
type ShareOptions struct {
	File     string    // what to share; "": this program's own binary
	Socket   string    // of a pager that runs already; "": start one
	Out      io.Writer // the report, as text, while it goes; nil: none
	Progress bool      // Out is a terminal: show a line that changes
}

// Step is one row of the demonstration.
type Step struct {
	Who     string        `json:"who"`  // "writer" or "reader"
	What    string        `json:"what"` // what it did
	PID     int           `json:"pid"`
	Counts  Counts        `json:"counts"` // as the pager counts
	Touch   Latency       `json:"touch"`  // as the thread sees it
	Bytes   int64         `json:"bytes"`
	Elapsed time.Duration `json:"elapsed_ns"`
	Map     string        `json:"map"` // of the pages after it: see drawMap
}

// ShareResult is what Share found.
type ShareResult struct {
	File     string      `json:"file"`
	Size     int64       `json:"size_bytes"`
	PageSize int         `json:"page_size"`
	Pager    region.Info `json:"pager"`
	Steps    []Step      `json:"steps"`
	FileHash string      `json:"file_sha256"`
	Shared   string      `json:"shared_sha256"` // computed by the reader over what the writer wrote
	PagedIn  string      `json:"paged_in_sha256"`
	Equal    bool        `json:"equal"` // all three are
}

// Share starts a pager (or uses the one at o.Socket) and two processes. The writer makes an object and copies the file into it by touching
// memory; the reader maps the same object by its port and hashes it; everything is paged out, twice, and the reader hashes again. The error
// wraps ErrDiffers if a hash is not the file's; the result is complete then, too.
func Share(ctx context.Context, o *ShareOptions) (res *ShareResult, err error) {
	if o == nil {
		o = &ShareOptions{}
	}
	s := &share{o: *o, res: &ShareResult{File: o.File}}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.file(); err != nil {
		return nil, err
	}
	if err := s.start(ctx); err != nil {
		return nil, err
	}
	if err := s.play(ctx); err != nil {
		return nil, err
	}
	r := s.res
	r.Equal = r.Shared == r.FileHash && r.PagedIn == r.FileHash
	s.verdict()
	if !r.Equal {
		return r, fmt.Errorf("share %s: %w", r.File, ErrDiffers)
	}
	return r, nil
}

// share is one run.
type share struct {
	o              ShareOptions
	res            *ShareResult
	dir            string // of the socket of a pager of our own
	pager          *region.Pager
	object         *region.Object // for a look at the pages
	writer, reader *peer
}

// file looks at the file and computes its hash.
func (s *share) file() error {
	r := s.res
	if r.File == "" {
		exe, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find this program: %w", err)
		}
		r.File = exe
	}
	abs, err := filepath.Abs(r.File)
	if err != nil {
		return err
	}
	r.File = abs
	f, err := os.Open(r.File)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Size() == 0 {
		return fmt.Errorf("share %s: want a regular file that is not empty", r.File)
	}
	h := sha256.New()
	if r.Size, err = io.Copy(h, f); err != nil {
		return err
	}
	r.FileHash = hex.EncodeToString(h.Sum(nil))
	return nil
}

// start makes all the processes there are.
func (s *share) start(ctx context.Context) (err error) {
	socket := s.o.Socket
	if socket == "" {
		if s.dir, err = os.MkdirTemp("", "machpager-demo-"); err != nil {
			return err
		}
		socket = filepath.Join(s.dir, "pager.sock")
		s.pager, err = spawn.Start(ctx, &spawn.Options{Socket: socket})
	} else {
		s.pager, err = region.Dial(ctx, socket, nil)
	}
	if err != nil {
		return err
	}
	if s.res.Pager, err = s.pager.Info(ctx); err != nil {
		return err
	}
	if s.writer, err = startPeer(ctx, "writer"); err != nil {
		return err
	}
	made, err := s.writer.call(request{Do: doMap, Socket: socket, Size: s.res.Size}, nil)
	if err != nil {
		return err
	}
	s.res.PageSize = made.PageSize
	if s.reader, err = startPeer(ctx, "reader"); err != nil {
		return err
	}
	if _, err = s.reader.call(request{Do: doMap, Socket: socket, Port: made.Port}, nil); err != nil {
		return err
	}
	port, err := emm.ParsePort(made.Port)
	if err != nil {
		return err
	}
	s.object, err = s.pager.ObjectOpen(ctx, port)
	return err
}

// play is the demonstration itself.
func (s *share) play(ctx context.Context) error {
	s.heading()
	for _, step := range []struct {
		who  *peer
		req  request
		what string
		hash *string
	}{
		{s.writer, request{Do: doCopy, File: s.res.File}, "copies the file in", nil},
		{s.reader, request{Do: doHash}, "hashes", &s.res.Shared},
		{s.writer, request{Do: doPageOut}, "pages out", nil},
		{s.writer, request{Do: doRewrite}, "reads, writes back", nil},
		{s.writer, request{Do: doPageOut}, "pages out", nil},
		{s.reader, request{Do: doHash}, "hashes again", &s.res.PagedIn},
	} {
		r, err := step.who.call(step.req, func(r report) { s.progress(ctx, step.who, step.what, r) })
		if err != nil {
			s.clearProgress()
			return err
		}
		if step.hash != nil {
			*step.hash = r.Hash
		}
		pages, err := s.object.Pages(ctx)
		if err != nil {
			return err
		}
		row := Step{Who: step.who.role, What: step.what, PID: step.who.cmd.Process.Pid, Counts: r.Counts, Touch: r.Touch, Bytes: r.Bytes, Elapsed: r.Elapsed,
			Map: drawMap(pages, mapWidth)}
		s.res.Steps = append(s.res.Steps, row)
		s.clearProgress()
		s.row(row)
	}
	return nil
}

// close ends the processes and waits for them.
func (s *share) close() error {
	var errs []error
	for _, p := range []*peer{s.reader, s.writer} {
		if p != nil {
			errs = append(errs, p.close())
		}
	}
	if s.pager != nil {
		errs = append(errs, s.pager.Close())
	}
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}
