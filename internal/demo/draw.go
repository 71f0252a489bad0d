//go:build linux

package demo

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"machpager/region"
)

// mapWidth is how many characters a map of pages has at most.
const mapWidth = 64

// What stands for pages in a map. A character that stands for several pages shows the most changed of them.
const (
	glyphAbsent = '·'
	glyphMoving = '+' // requested, cleaning or evicting
	glyphClean  = '░'
	glyphDirty  = '█'
	glyphError  = '!'
)

// drawMap draws the pages with width characters or fewer, one for the same number of pages each.
func drawMap(pages []region.Page, width int) string {
	if len(pages) == 0 {
		return ""
	}
	each := (len(pages) + width - 1) / width
	var b strings.Builder
	for len(pages) > 0 {
		n := min(each, len(pages))
		best := 0
		for _, p := range pages[:n] {
			best = max(best, rank(p.State()))
		}
		b.WriteRune([...]rune{glyphAbsent, glyphClean, glyphMoving, glyphDirty, glyphError}[best])
		pages = pages[n:]
	}
	return b.String()
}

// rank orders states by how much they matter to who looks at a map.
func rank(s region.PageState) int {
	switch s {
	case region.PageAbsent:
		return 0
	case region.PageClean:
		return 1
	case region.PageDirty:
		return 3
	case region.PageError:
		return 4
	}
	return 2
}

func (s *share) printf(format string, args ...any) {
	if s.o.Out != nil {
		fmt.Fprintf(s.o.Out, format, args...)
	}
}

func (s *share) heading() {
	r, i := s.res, s.res.Pager
	pages := "1 page"
	if n := (r.Size-1)/int64(r.PageSize) + 1; n > 1 {
		pages = fmt.Sprintf("%d pages", n)
	}
	s.printf("%s: %s, %s of %d bytes\n", filepath.Base(r.File), bytesText(r.Size), pages, r.PageSize)
	s.printf("pager %d", i.PagerPID)
	if i.GuardianPID != 0 {
		s.printf(", guardian %d", i.GuardianPID)
	}
	s.printf(", writer %d, reader %d; Linux %s; tier %s; frames: %s, at most %s\n\n",
		s.writer.cmd.Process.Pid, s.reader.cmd.Process.Pid, i.Kernel, i.Tier, i.Frames, bytesText(i.Budget))
	s.printf("%-25s  %31s  %15s  %15s  %9s\n", "", "faults, answered with", "pages", "a fault, us", "")
	s.printf("%-25s  %7s %7s %7s %7s  %7s %7s  %7s %7s  %9s\n", "", "zeros", "stored", "minor", "wr-prot", "in", "out", "p50", "p99", "MiB/s")
}

func (s *share) row(st Step) {
	c := st.Counts
	p50, p99 := "-", "-"
	if st.Touch.Faults > 0 {
		p50, p99 = us(st.Touch.P50), us(st.Touch.P99)
	}
	n := st.Bytes
	if n == 0 { // a page-out moves pages and touches none
		n = int64(c.PagesOut) * int64(s.res.PageSize)
	}
	s.printf("%-25s  %7d %7d %7d %7d  %7d %7d  %7s %7s  %9.1f\n", st.Who+" "+st.What, c.ZeroFilled, c.Stored, c.Minor, c.WriteProtect, c.PagesIn, c.PagesOut,
		p50, p99, float64(n)/(1<<20)/max(st.Elapsed.Seconds(), 1e-9))
	s.printf("  %s\n", st.Map)
}

func (s *share) verdict() {
	r := s.res
	s.printf("  %c absent  %c clean  %c dirty\n\n", glyphAbsent, glyphClean, glyphDirty)
	s.printf("sha256 %s  the file\n", r.FileHash)
	for _, h := range []struct{ hash, what string }{{r.Shared, "the reader, while the writer has it in memory"}, {r.PagedIn, "the reader, after all was paged out"}} {
		verdict := "equal"
		if h.hash != r.FileHash {
			verdict = "DIFFERENT"
		}
		s.printf("sha256 %s  %s: %s\n", h.hash, h.what, verdict)
	}
}

// progress shows on a terminal how far a step is.
func (s *share) progress(ctx context.Context, p *peer, what string, r report) {
	if !s.o.Progress || s.o.Out == nil {
		return
	}
	const width = 32
	pages, err := s.object.Pages(ctx)
	if err != nil {
		return
	}
	c := r.Counts
	s.printf("\r\x1b[K%s %s %3d%%  zeros %d stored %d minor %d wr-prot %d  %s", p.role, what, 100*r.Bytes/s.res.Size, c.ZeroFilled, c.Stored, c.Minor, c.WriteProtect,
		drawMap(pages, width))
}

func (s *share) clearProgress() {
	if s.o.Progress {
		s.printf("\r\x1b[K")
	}
}

func us(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/1e3) }

// bytesText is a number of bytes for people.
func bytesText(n int64) string {
	f, unit := float64(n), 0
	for f >= 1024 && unit < 4 {
		f /= 1024
		unit++
	}
	if n == 1 {
		return "1 byte"
	}
	if unit == 0 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%.1f %s", f, [...]string{"", "KiB", "MiB", "GiB", "TiB"}[unit])
}
