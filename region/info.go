//go:build linux

package region

import (
	"context"
	"time"

	"machpager/internal/ipc"
)

// PageState is where a page is in its life.
type PageState uint8

// The states of a page.
const (
	PageAbsent    PageState = iota // not in memory; the manager has its contents, or it was never written
	PageRequested                  // on its way in
	PageClean                      // in memory, and the manager could supply the same
	PageDirty                      // in memory, changed since
	PageCleaning                   // on its way to the manager
	PageEvicting                   // on its way out of memory
	PageError                      // could not be had
)

var pageStates = [...]string{"absent", "requested", "clean", "dirty", "cleaning", "evicting", "error"}

// String is the state in lower case.
func (s PageState) String() string {
	if int(s) < len(pageStates) {
		return pageStates[s]
	}
	return "invalid"
}

// Page is the state of one page, and what else is known of it.
type Page byte

// State is where the page is in its life.
func (p Page) State() PageState { return PageState(byte(p) & ipc.PageStateMask) }

// Resident reports whether the page has a frame.
func (p Page) Resident() bool { s := p.State(); return s != PageAbsent && s != PageError }

// Wired reports whether the page cannot be evicted.
func (p Page) Wired() bool { return byte(p)&ipc.PageWired != 0 }

// Precious reports whether the manager keeps no copy while the page is in memory.
func (p Page) Precious() bool { return byte(p)&ipc.PagePrecious != 0 }

// Stored reports whether the manager is known to have contents for the page.
func (p Page) Stored() bool { return byte(p)&ipc.PageStored != 0 }

// Latency summarises how long faults took in the pager, from the message read to the thread woken.
type Latency struct {
	Count uint64        `json:"count"`  // faults measured
	P50   time.Duration `json:"p50_ns"` // half took no longer
	P99   time.Duration `json:"p99_ns"`
	Max   time.Duration `json:"max_ns"`
}

// Stats are the counters of one Region. Counts are since it was mapped.
type Stats struct {
	ZeroFilled   uint64  `json:"zero_filled"`    // faults on pages never written
	Stored       uint64  `json:"stored"`         // faults on pages whose contents the manager supplied
	Minor        uint64  `json:"minor"`          // faults on pages that were in memory already
	WriteProtect uint64  `json:"write_protect"`  // first writes to clean pages
	Errors       uint64  `json:"errors"`         // faults that ended in a memory error
	PagesIn      uint64  `json:"pages_in"`       // pages filled, also those that nobody waited for
	PagesOut     uint64  `json:"pages_out"`      // pages returned to the manager
	Resident     int64   `json:"resident_bytes"` // bytes of the region in memory now
	Dirty        int64   `json:"dirty_bytes"`    // bytes of it that the manager does not have
	Latency      Latency `json:"latency"`
}

func newStats(s ipc.RegionStatsReply) Stats {
	return Stats{ZeroFilled: s.ZeroFilled, Stored: s.Stored, Minor: s.Minor, WriteProtect: s.WriteProtect, Errors: s.Errors,
		PagesIn: s.PagesIn, PagesOut: s.PagesOut, Resident: s.Resident, Dirty: s.Dirty,
		Latency: Latency{Count: s.Latency.Count, P50: time.Duration(s.Latency.P50), P99: time.Duration(s.Latency.P99), Max: time.Duration(s.Latency.Max)}}
}

// ObjectInfo describes one object in a list. It has no port: a list gives no rights.
type ObjectInfo struct {
	ID       uint64 `json:"id"`             // the pager's number for it, never used twice
	Size     int64  `json:"size_bytes"`     // as created
	PageSize int    `json:"page_size"`      // bytes
	Resident int64  `json:"resident_bytes"` // in memory
	Stored   int64  `json:"stored_bytes"`   // in paging space
	Mappings int    `json:"mappings"`       // in all tasks
}

// Info describes the pager. -1 means unknown, or no limit.
type Info struct {
	MinPageSize    int    `json:"min_page_size"`         // bytes; the page size where none is asked for
	MaxPageSize    int    `json:"max_page_size"`         // bytes
	Budget         int64  `json:"budget_bytes"`          // what all objects together may occupy in memory
	Resident       int64  `json:"resident_bytes"`        // what they do, as the pager counts
	KernelResident int64  `json:"kernel_resident_bytes"` // what they do, as the kernel counts
	PagingTotal    int64  `json:"paging_total_bytes"`    // paging space
	PagingFree     int64  `json:"paging_free_bytes"`     // of it free
	Tasks          int    `json:"tasks"`                 // connections
	Objects        int    `json:"objects"`
	Mappings       int    `json:"mappings"`
	Frames         string `json:"frames"`       // where resident pages live
	Tier           string `json:"tier"`         // "A", "B" or "C": the pager's privileges
	TierText       string `json:"tier_text"`    // what that means
	PagerPID       int    `json:"pager_pid"`    // as the pager sees itself
	GuardianPID    int    `json:"guardian_pid"` // 0: none
	Kernel         string `json:"kernel"`       // release
	Version        string `json:"version"`      // of the pager
	Confinement    string `json:"confinement"`  // what the pager has given up, or why it has not
	Quotas         string `json:"quotas"`       // what users and tasks may have
}

// Objects lists the objects of the pager (default_pager_objects). Objects that come or go meanwhile may be missed.
func (p *Pager) Objects(ctx context.Context) ([]ObjectInfo, error) {
	list, after := []ObjectInfo{}, uint64(0)
	for {
		m, err := p.link.Call(ctx, ipc.TypeObjects, ipc.Objects{After: after}, nil)
		if err != nil {
			return nil, p.failed("list objects", err)
		}
		r, tail, err := ipc.Decode[ipc.ObjectsReply](m.Body)
		m.Close()
		var entries []ipc.ObjectEntry
		if err == nil {
			entries, err = ipc.DecodeList[ipc.ObjectEntry](tail)
		}
		if err != nil {
			return nil, p.failed("list objects", err)
		}
		for _, e := range entries {
			if e.ID <= after && len(list) > 0 {
				return list, nil // no progress: not a list in order
			}
			after = e.ID
			list = append(list, ObjectInfo{ID: e.ID, Size: e.Size, PageSize: int(e.PageSize), Resident: e.Resident, Stored: e.Stored, Mappings: int(e.Mappings)})
		}
		if r.More == 0 || len(entries) == 0 {
			return list, nil
		}
	}
}

// Info tells how the pager is doing (default_pager_info).
func (p *Pager) Info(ctx context.Context) (Info, error) {
	m, err := p.link.Call(ctx, ipc.TypeInfo, nil, nil)
	if err != nil {
		return Info{}, p.failed("read pager info", err)
	}
	defer m.Close()
	r, tail, err := ipc.Decode[ipc.InfoReply](m.Body)
	var text []string
	if err == nil {
		text, err = ipc.DecodeStrings(tail, 6)
	}
	if err != nil {
		return Info{}, p.failed("read pager info", err)
	}
	return Info{
		MinPageSize: int(r.MinPageSize), MaxPageSize: int(r.MaxPageSize), Budget: r.Budget, Resident: r.Resident, KernelResident: r.KernelResident,
		PagingTotal: r.PagingTotal, PagingFree: r.PagingFree, Tasks: int(r.Tasks), Objects: int(r.Objects), Mappings: int(r.Mappings),
		Frames: text[0], Tier: string(rune(r.Tier)), TierText: text[1], PagerPID: int(r.PagerPID), GuardianPID: int(r.GuardianPID),
		Kernel: text[2], Version: text[3], Confinement: text[4], Quotas: text[5],
	}, nil
}
