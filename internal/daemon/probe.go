package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"machpager/internal/guardian"
	"machpager/pager/emm"
	"machpager/uffd"
)

// prober finds out whether a task registered what it says, without touching it.
type prober struct{ nowhere []byte } // a page that nobody can read

func newProber() (*prober, error) {
	b, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map a page to probe with: %w", err)
	}
	return &prober{b}, nil
}

func (p *prober) close() { unix.Munmap(p.nowhere) }

// registered looks at the first and the last page of a range. A COPY from where nobody can read changes nothing, but the kernel looks first whether the page
// is registered: ENOENT. So does taking away a protection that cannot be there yet. What lies between is the task's own risk: faults that the
// pager is not told of.
func (p *prober) registered(fd *uffd.FD, r guardian.Range, readOnly bool) error {
	n := uint64(len(p.nowhere))
	for _, page := range [...]uint64{r.Start, r.Start + r.Len - n} {
		_, err := fd.Copy(page, p.nowhere, uffd.CopyDontWake)
		if err != nil && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL)) {
			return fmt.Errorf("page %#x is not registered on the task's userfaultfd: %w: %w", page, err, emm.InvalidAddress)
		}
		if readOnly {
			continue
		}
		if err := fd.WriteProtect(page, n, uffd.WriteProtectDontWake); errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("page %#x is not registered for write-protection: %w: %w", page, err, emm.InvalidAddress)
		}
	}
	return nil
}

// unserved are features that would make a userfaultfd behave otherwise than this pager serves it: events that it does not ask for (while one is unread
// every fill fails), signals in the place of faults, and writes to protected pages that nobody is told of.
const unserved = uffd.FeatureEventFork | uffd.FeatureEventRemove | uffd.FeatureEventUnmap | uffd.FeatureSigbus | uffd.FeatureWPAsync

// checkFeatures looks whether a userfaultfd has the features that its task says, and those that are needed.
func checkFeatures(fd int, said uffd.Features) error {
	have, err := featuresOf(fd)
	switch missing := uffd.RequiredFeatures &^ (said & have); {
	case err != nil:
		return err
	case missing != 0:
		return fmt.Errorf("it lacks %v: %w", missing, emm.InvalidArgument)
	case have&unserved != 0:
		return fmt.Errorf("%v: not served here (against a fork there is MADV_DONTFORK): %w", have&unserved, emm.InvalidArgument)
	case have != said:
		return fmt.Errorf("it has %v, not %v: %w", have, said, emm.InvalidArgument)
	}
	return nil
}

// featuresOf is what a userfaultfd was opened with, as proc_pid_fdinfo(5) shows: a line "API: version:features:everything", in hexadecimal.
func featuresOf(fd int) (uffd.Features, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, fmt.Errorf("look up its features: %w", err)
	}
	var version, features, all uint64
	_, line, _ := bytes.Cut(b, []byte("API:"))
	if _, err := fmt.Sscanf(string(line), "%x:%x:%x", &version, &features, &all); err != nil {
		return 0, fmt.Errorf("look up its features in %q: %w", b, err)
	}
	const initialized = 1 << 31 // the kernel's own mark that the handshake was made
	return uffd.Features(features &^ initialized), nil
}
