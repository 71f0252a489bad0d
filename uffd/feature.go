//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// RequiredFeatures is what machpager's mappings need of a userfaultfd. All are there from Linux 6.6.
const RequiredFeatures = FeatureMissingShmem | FeatureMinorShmem | FeatureWriteProtect | FeatureWriteProtectShmem | FeatureExactAddress |
	FeatureThreadID | FeaturePoison | FeatureEventRemap

// RequiredKernel is the oldest kernel that has RequiredFeatures, and Continue with ContinueWP.
const RequiredKernel = "6.6"

var featureTable = []struct {
	bit    Features
	name   string // without UFFD_FEATURE_
	kernel string // the first release with it
}{
	{FeatureWriteProtect, "PAGEFAULT_FLAG_WP", "5.7"},
	{FeatureEventFork, "EVENT_FORK", "4.11"},
	{FeatureEventRemap, "EVENT_REMAP", "4.11"},
	{FeatureEventRemove, "EVENT_REMOVE", "4.11"},
	{FeatureMissingHugetlb, "MISSING_HUGETLBFS", "4.11"},
	{FeatureMissingShmem, "MISSING_SHMEM", "4.11"},
	{FeatureEventUnmap, "EVENT_UNMAP", "4.11"},
	{FeatureSigbus, "SIGBUS", "4.14"},
	{FeatureThreadID, "THREAD_ID", "4.14"},
	{FeatureMinorHugetlb, "MINOR_HUGETLBFS", "5.13"},
	{FeatureMinorShmem, "MINOR_SHMEM", "5.14"},
	{FeatureExactAddress, "EXACT_ADDRESS", "5.18"},
	{FeatureWriteProtectShmem, "WP_HUGETLBFS_SHMEM", "5.19"},
	{FeatureWPUnpopulated, "WP_UNPOPULATED", "6.4"},
	{FeaturePoison, "POISON", "6.6"},
	{FeatureWPAsync, "WP_ASYNC", "6.7"},
	{FeatureMove, "MOVE", "6.8"},
}

// String lists the features as the kernel names them, joined by "|".
func (f Features) String() string {
	var names []string
	for _, t := range featureTable {
		if f&t.bit != 0 {
			names = append(names, t.name)
			f &^= t.bit
		}
	}
	if f != 0 || len(names) == 0 {
		names = append(names, fmt.Sprintf("%#x", uint64(f)))
	}
	return strings.Join(names, "|")
}

// missing returns an error that is ErrNotSupported and lists each feature of f with the kernel that brought it; nil if f is empty.
func (f Features) missing() error {
	if f == 0 {
		return nil
	}
	var list []string
	for _, t := range featureTable {
		if f&t.bit != 0 {
			list = append(list, fmt.Sprintf("%s (Linux %s)", t.name, t.kernel))
			f &^= t.bit
		}
	}
	if f != 0 {
		list = append(list, f.String())
	}
	return fmt.Errorf("userfaultfd %s: %w", strings.Join(list, ", "), ErrNotSupported)
}

// available is cached once the kernel has answered.
var available struct {
	mu       sync.Mutex
	known    bool
	features Features
}

// Available returns the features this kernel has. It needs no privilege, unless userfaultfd(2) is forbidden altogether.
func Available() (Features, error) {
	available.mu.Lock()
	defer available.mu.Unlock()
	if available.known {
		return available.features, nil
	}
	// User mode only is open to everybody; kernels before 5.11 do not know it.
	f, err := query(&OpenOptions{UserModeOnly: true})
	if errors.Is(err, unix.EINVAL) {
		f, err = query(&OpenOptions{})
	}
	if errors.Is(err, unix.ENOSYS) {
		f, err = 0, nil // a kernel without userfaultfd: a conclusive answer
	}
	if err != nil {
		return 0, err
	}
	available.known, available.features = true, f
	return f, nil
}

// query asks for the features on a userfaultfd of its own, since the handshake can be made once only.
func query(o *OpenOptions) (Features, error) {
	fd, err := create(o)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	f, _, errno := ioctlAPI(fd, apiVersion, 0)
	if errno != 0 {
		return 0, fmt.Errorf("ask for userfaultfd features: %w", errno)
	}
	return f, nil
}

// Have tells whether this kernel has all of f: nil, an error that is ErrNotSupported and lists what is missing with the kernel that
// brought it, or an error that says that the probe failed. Only a conclusive answer is kept.
func Have(f Features) error {
	got, err := Available()
	if err != nil {
		return fmt.Errorf("probe userfaultfd: %w", err)
	}
	return (f &^ got).missing()
}

// The probes of single features; see Have and the constants.

func HaveWriteProtect() error      { return Have(FeatureWriteProtect) }
func HaveEventFork() error         { return Have(FeatureEventFork) }
func HaveEventRemap() error        { return Have(FeatureEventRemap) }
func HaveEventRemove() error       { return Have(FeatureEventRemove) }
func HaveMissingHugetlb() error    { return Have(FeatureMissingHugetlb) }
func HaveMissingShmem() error      { return Have(FeatureMissingShmem) }
func HaveEventUnmap() error        { return Have(FeatureEventUnmap) }
func HaveSigbus() error            { return Have(FeatureSigbus) }
func HaveThreadID() error          { return Have(FeatureThreadID) }
func HaveMinorHugetlb() error      { return Have(FeatureMinorHugetlb) }
func HaveMinorShmem() error        { return Have(FeatureMinorShmem) }
func HaveExactAddress() error      { return Have(FeatureExactAddress) }
func HaveWriteProtectShmem() error { return Have(FeatureWriteProtectShmem) }
func HaveWPUnpopulated() error     { return Have(FeatureWPUnpopulated) }
func HavePoison() error            { return Have(FeaturePoison) }
func HaveWPAsync() error           { return Have(FeatureWPAsync) }
func HaveMove() error              { return Have(FeatureMove) }

// HaveContinueWP tells whether Continue knows ContinueWP, which came without a feature bit. Linux 6.4.
func HaveContinueWP() error { return continueWPProbe.have() }

// HaveRequired tells whether this kernel has all that machpager needs. The error names everything that is missing.
func HaveRequired() error {
	f := Have(RequiredFeatures)
	if f != nil && !errors.Is(f, ErrNotSupported) {
		return f
	}
	err := errors.Join(f, HaveContinueWP())
	if err == nil {
		return nil
	}
	return fmt.Errorf("machpager needs Linux %s or newer: %w", RequiredKernel, err)
}

// probe finds out once whether something works that has no feature bit.
type probe struct {
	name, kernel string               // immutable
	try          func() (bool, error) // immutable; an error: not conclusive

	mu    sync.Mutex
	known bool // guarded by mu
	works bool // guarded by mu
}

func (p *probe) have() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.known {
		works, err := p.try()
		if err != nil {
			return fmt.Errorf("probe %s: %w", p.name, err)
		}
		p.known, p.works = true, works
	}
	if !p.works {
		return fmt.Errorf("%s (Linux %s): %w", p.name, p.kernel, ErrNotSupported)
	}
	return nil
}

var continueWPProbe = probe{name: "userfaultfd CONTINUE with write-protect", kernel: "6.4", try: func() (bool, error) {
	if f, err := Available(); err != nil || f&FeatureMinorShmem == 0 {
		return false, err // without minor faults there is no CONTINUE at all
	}
	u, err := Open(&OpenOptions{UserModeOnly: true})
	if err != nil {
		return false, err
	}
	defer u.Close()
	page := unix.Getpagesize()
	mem, err := unix.Mmap(-1, 0, page, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return false, err
	}
	defer unix.Munmap(mem)
	// The mode is looked at before the mapping: EINVAL tells that it is unknown, ENOENT that only the mapping is not registered.
	_, err = u.Continue(address(mem), uint64(page), ContinueWP)
	switch {
	case errors.Is(err, unix.ENOENT):
		return true, nil
	case errors.Is(err, unix.EINVAL):
		return false, nil
	case err == nil:
		return false, errors.New("an unregistered range was continued")
	}
	return false, err
}}
