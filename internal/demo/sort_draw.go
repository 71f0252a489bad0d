//go:build linux

package demo

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

func (j *job) printf(format string, args ...any) {
	if j.o.Out != nil {
		fmt.Fprintf(j.o.Out, format, args...)
	}
}

func (j *job) heading() {
	r, i := j.res, j.res.Pager
	name := "generated"
	if r.File != "" {
		name = filepath.Base(r.File)
	}
	kind := fmt.Sprintf("records of %d bytes, keys of %d", r.Record, r.Key)
	if r.Lines {
		kind = "lines"
	}
	j.printf("%s: %s of %s; %d goroutines\n", name, bytesText(r.Size), kind, r.Workers)
	j.printf("pager %d", i.PagerPID)
	if i.GuardianPID != 0 {
		j.printf(", guardian %d", i.GuardianPID)
	}
	j.printf("; Linux %s; tier %s; frames: %s, at most %s\n\n", i.Kernel, i.Tier, i.Frames, bytesText(i.Budget))
	j.printf("%-16s  %31s  %17s\n", "", "faults, answered with", "pages")
	j.printf("%-16s  %7s %7s %7s %7s  %8s %8s  %8s  %8s\n", "", "zeros", "stored", "minor", "wr-prot", "in", "out", "s", "MiB/s")
}

// counts of both regions.
func (j *job) counts() Counts {
	a, b := counts(j.from.region.Stats()), counts(j.to.region.Stats())
	return Counts{a.ZeroFilled + b.ZeroFilled, a.Stored + b.Stored, a.Minor + b.Minor, a.WriteProtect + b.WriteProtect, a.PagesIn + b.PagesIn, a.PagesOut + b.PagesOut}
}

// maps of both regions' pages.
func (j *job) maps(ctx context.Context) (m [2]string) {
	for i, x := range []*memory{j.from, j.to} {
		if pages, err := x.object.Pages(ctx); err == nil {
			m[i] = drawMap(pages, mapWidth)
		}
	}
	return m
}

// phase does one step, shows how it goes, and writes a row about it.
func (j *job) phase(ctx context.Context, what string, bytes int64, f func() error) error {
	if j.quiet {
		what = "plain " + what
	}
	j.mu.Lock()
	j.step, j.total, j.began, j.before = what, bytes, time.Now(), j.counts()
	j.mu.Unlock()
	j.done.Store(0)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for j.o.Progress {
			select {
			case <-stop:
				return
			case <-tick.C:
				j.draw(ctx)
			}
		}
	}()
	err := f()
	took := time.Since(j.began)
	close(stop)
	<-stopped
	j.erase()
	if err != nil {
		return err
	}
	st := SortStep{What: what, Bytes: j.done.Load(), Elapsed: took}
	j.sampler.look(ctx)
	if !j.quiet {
		st.Counts, st.Maps = j.counts().sub(j.before), j.maps(ctx)
	}
	j.res.Steps = append(j.res.Steps, st)
	j.row(st)
	return nil
}

func (j *job) row(st SortStep) {
	c := st.Counts
	rate := float64(st.Bytes) / (1 << 20) / max(st.Elapsed.Seconds(), 1e-9)
	if j.quiet {
		j.printf("%-16s  %49s  %8.2f  %8.1f\n", st.What, "", st.Elapsed.Seconds(), rate)
		return
	}
	j.printf("%-16s  %7d %7d %7d %7d  %8d %8d  %8.2f  %8.1f\n", st.What, c.ZeroFilled, c.Stored, c.Minor, c.WriteProtect, c.PagesIn, c.PagesOut, st.Elapsed.Seconds(), rate)
	for _, m := range st.Maps {
		j.printf("  %s\n", m)
	}
}

// barWidth is how many characters a bar of progress has.
const barWidth = 32

// draw shows on a terminal how far the step is, in lines that the next draw or erase takes away.
func (j *job) draw(ctx context.Context) {
	c, maps := j.counts().sub(j.before), j.maps(ctx)
	j.mu.Lock()
	total := max(1, j.total)
	j.mu.Unlock()
	share := min(1, float64(j.done.Load())/float64(total))
	full := int(share * barWidth)
	now, most, budget := j.sampler.seen()
	j.erase()
	j.printf("%-16s [%s%s] %3.0f%%  %.1f s\n", j.step, strings.Repeat("#", full), strings.Repeat("-", barWidth-full), 100*share, time.Since(j.began).Seconds())
	j.printf("  zeros %d stored %d minor %d wr-prot %d  pages in %d out %d\n", c.ZeroFilled, c.Stored, c.Minor, c.WriteProtect, c.PagesIn, c.PagesOut)
	j.printf("  resident %s, at most %s of %s so far\n", bytesText(now), bytesText(most), bytesText(budget))
	j.printf("  %s\n  %s\n", maps[0], maps[1])
	j.drawn = 5
}

// erase takes away what draw has shown.
func (j *job) erase() {
	if j.drawn > 0 {
		j.printf("\x1b[%dA\r\x1b[J", j.drawn)
		j.drawn = 0
	}
}

func (j *job) verdict(same, held bool) {
	r := j.res
	say := func(ok bool, yes, no string) string {
		if ok {
			return yes
		}
		return no
	}
	j.printf("  %c absent  %c clean  %c dirty\n\n", glyphAbsent, glyphClean, glyphDirty)
	j.printf("sorted    %.2f s, %.1f MiB/s: %d runs, merged in %s\n", r.Elapsed.Seconds(), float64(r.Size)/(1<<20)/max(r.Elapsed.Seconds(), 1e-9), r.Runs,
		say(r.Passes == 1, "one pass", fmt.Sprintf("%d passes, for so little memory cannot hold a block of each run", r.Passes)))
	j.printf("order     %s\n", say(r.Sorted, "each key is not less than the one before", "WRONG"))
	j.printf("records   %d, checksum %s before and %s after: %s\n", r.Records, r.InputSum, r.OutputSum, say(same, "equal", "DIFFERENT"))
	if r.Plain == nil {
		j.printf("plain     not compared with the same sort in plain memory: it was not asked for, or does not fit\n")
	} else {
		j.printf("plain     the same sort in plain memory took %.2f s (%.1f times faster), and its result is %s\n", r.Plain.Elapsed.Seconds(),
			r.Elapsed.Seconds()/max(r.Plain.Elapsed.Seconds(), 1e-9), say(r.Plain.Equal, "equal, byte for byte", "DIFFERENT"))
	}
	j.printf("resident  at most %d bytes of %d, as the kernel counts (asked %d times): %s\n", r.MaxResident, r.Budget, r.Samples, say(held, "the limit held", "OVER THE LIMIT"))
}
