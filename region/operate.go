//go:build linux

package region

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"machpager/internal/ipc"
)

// CheckReport is what a check of a live pager has found.
type CheckReport struct {
	Problems []CheckProblem `json:"problems"`
	More     int            `json:"more_problems"` // that are not listed
	VM       struct {
		Objects   int   `json:"objects"`
		Pages     int64 `json:"pages"`           // that were ever touched
		Resident  int64 `json:"resident_pages"`  // held against the files that they are in
		Empty     int64 `json:"empty_pages"`     // dirty, and without a frame: they read as zeros. A task threw them away, or they were never written
		Unsettled int64 `json:"unsettled_pages"` // somebody was at work on them whenever they were looked at
		Uncounted int   `json:"uncounted"`       // counts that changed whenever they were taken
	} `json:"vm"`
	Paging struct {
		Objects   int   `json:"objects"`
		Pages     int64 `json:"stored_pages"` // read back, and their checksums compared
		Bytes     int64 `json:"bytes_read"`
		Slots     int64 `json:"slots"`  // in use
		Shared    int64 `json:"shared"` // of those: by several objects, after snapshots
		Uncounted int   `json:"uncounted"`
	} `json:"paging"`
	Took time.Duration `json:"took_ns"`
}

// CheckProblem is a broken invariant.
type CheckProblem struct {
	Where  string `json:"where"`  // "pages": page tables, files and frames; "paging space"; "rights"
	Object int64  `json:"object"` // -1: of no object
	Off    int64  `json:"off"`    // bytes; -1: nowhere in particular
	What   string `json:"what"`
}

// Check checks the invariants of the pager while it serves: page tables against the files that pages are in, counts of frames against the kernel's, every stored page against
// its checksum, page maps against paging space. Reading all that is stored may take long; who faults goes first. An error says that it could not be done; what it
// has found is in the report. For the pager's own user and root: unix.EPERM for others; unix.EBUSY while another check is under way.
func (p *Pager) Check(ctx context.Context) (*CheckReport, error) {
	b, err := p.document(ctx, "check pager", ipc.TypeCheck)
	if err != nil {
		return nil, err
	}
	r := &CheckReport{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("check pager: read its report: %w", err)
	}
	return r, nil
}

// Dump is all that the pager knows of its tasks, objects, pages, outstanding requests, frames and paging space, as JSON, for people: its layout may change with every version. For
// the pager's own user and root: unix.EPERM for others.
func (p *Pager) Dump(ctx context.Context) (json.RawMessage, error) {
	return p.document(ctx, "dump pager", ipc.TypeDump)
}

// maxDocument bounds what is read of a reply in a file, in bytes.
const maxDocument = 1 << 30

// document asks for a reply in a file.
func (p *Pager) document(ctx context.Context, what string, t ipc.Type) ([]byte, error) {
	m, err := p.link.Call(ctx, t, nil, nil)
	if err != nil {
		return nil, p.failed(what, err)
	}
	defer m.Close()
	r, _, err := ipc.Decode[ipc.Document](m.Body)
	if err != nil {
		return nil, p.failed(what, err)
	}
	f := os.NewFile(uintptr(m.TakeFD(0)), "document")
	defer f.Close()
	b := make([]byte, min(max(r.Size, 0), maxDocument))
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, int64(len(b))), b); err != nil {
		return nil, fmt.Errorf("%s: read the reply: %w", what, err)
	}
	return b, nil
}
