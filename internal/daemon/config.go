package daemon

import (
	"bufio"
	"bytes"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"machpager/internal/frames"
	"machpager/internal/policy"
	"machpager/pager/emm"
	"machpager/pager/store"
)

// Config is what a pager is told at its start. It travels from process to process as JSON.
type Config struct {
	Resident   int64         // bytes of memory all objects together may occupy; 0: half of what is available
	Store      string        // where contents go: one of Stores; "": StoreTiered
	Dir        string        // of StoreFile and StoreTiered: where the unlinked paging file is made; "": os.TempDir()
	Compressed int64         // bytes of memory that compressed contents may take, beside Resident; 0: of StoreTiered half of Resident, else no limit
	Capacity   int64         // bytes of paging space; 0: no limit of its own
	Policy     string        // what chooses the pages that go: one of policy.Names; "": policy.Default
	Frames     frames.Kind   // 0: the best that works
	Socket     string        // listen here; "": do not
	Activated  bool          // Socket is there already, made by a service manager that passes it on: Options.Listener
	Group      string        // name or number of the group that may use Socket; "": the user alone
	Restarts   int           // deaths of the pager in a row that are answered with a new one: see guardian.Options; 0: the default, less: none
	Settled    time.Duration // how long a pager must have lived for its death to be the first in a row again; 0: 10 s
	NoStandby  bool          // start the next pager when one has died, and none beforehand: see guardian.Options.Standby
	Failpoints string        // of tests: what each pager arms (package failpoint); with ";" between, what the first, the second, ... and every one after those
	Confine    string        // one of Confines; "": ConfineAuto
	Quotas     Quotas        // of users and tasks
	GiveDevice bool          // hand an open /dev/userfaultfd to tasks that ask for it: what the sysctl vm.unprivileged_userfaultfd withholds
}

// minPages is the smallest budget, in pages of any object: what one instruction can need at once, and as many more.
const minPages = 8

// minResident is the smallest budget, in bytes.
const minResident = minPages * frames.PageSize

// minCompressed is the least compressed memory that StoreTiered takes by itself, in bytes: slabs of each size and a reserve.
const minCompressed = 4 << 20

// Check finds what no pager could be started with: an unknown kind of paging space, policy, confinement or group, and a budget that this machine does not have. It wraps
// emm.InvalidArgument, or emm.ResourceShortage for the budget.
func (c *Config) Check() error {
	if c.Store != "" && !slices.Contains(Stores, c.Store) {
		return fmt.Errorf("open paging space: kind %q: want one of %q: %w", c.Store, Stores, emm.InvalidArgument)
	}
	if names := policy.Names(); c.Policy != "" && !slices.Contains(names, c.Policy) {
		return fmt.Errorf("choose victims by policy %q: want one of %q: %w", c.Policy, names, emm.InvalidArgument)
	}
	if c.Confine != "" && !slices.Contains(Confines, c.Confine) {
		return fmt.Errorf("confine: %q: want one of %q: %w", c.Confine, Confines, emm.InvalidArgument)
	}
	if err := c.Quotas.check(); err != nil {
		return err
	}
	if c.Group != "" {
		if _, err := groupID(c.Group); err != nil {
			return fmt.Errorf("give the socket to group %q: %w: %w", c.Group, err, emm.InvalidArgument)
		}
	}
	for _, x := range []struct {
		what string
		n    int64
	}{{"resident memory", c.Resident}, {"compressed memory", c.Compressed}, {"paging space", c.Capacity}} {
		if x.n < 0 {
			return fmt.Errorf("%d bytes of %s: %w", x.n, x.what, emm.InvalidArgument)
		}
	}
	if c.Capacity != 0 && c.Capacity < store.SlotSize {
		return fmt.Errorf("%d bytes of paging space: at least %d are needed: %w", c.Capacity, int64(store.SlotSize), emm.InvalidArgument)
	}
	if c.Resident != 0 {
		return theMost().check(c.Resident)
	}
	return nil
}

// mostMemory is how large a budget can be, in bytes, and why.
type mostMemory struct {
	bytes int64
	whose string
}

// theMost finds it out. Where it cannot be found out there is no limit.
func theMost() mostMemory {
	m := mostMemory{math.MaxInt64, "this machine has"}
	if total, err := memInfo("MemTotal"); err == nil {
		m.bytes = total
	}
	if limit, _ := cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup"); limit < m.bytes {
		m = mostMemory{limit, "the control group of the pager may have"}
	}
	return m
}

// check refuses a budget that is too small to make progress in, or that no machine or control group of this size could hold. The tables that page-out keeps
// are as large as the budget asks, so more would not merely be useless.
func (m mostMemory) check(n int64) error {
	if n < minResident {
		return fmt.Errorf("%d bytes of resident memory: at least %d are needed: %w", n, int64(minResident), emm.InvalidArgument)
	}
	if n > m.bytes {
		return fmt.Errorf("%d bytes of resident memory: %s %d (what is paged out does not count: choose less, half of it is the default): %w", n, m.whose, m.bytes, emm.ResourceShortage)
	}
	return nil
}

// halfOfMemory is half of the memory that this process could have, in bytes: of what the machine has available and what every control group
// above this process leaves.
func halfOfMemory() (int64, error) {
	avail, err := memInfo("MemAvailable")
	if err != nil {
		return 0, fmt.Errorf("find out how much memory there is (or say how much may be resident): %w", err)
	}
	_, left := cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup")
	n := min(avail, left)
	return max(n/2, minResident) &^ (frames.PageSize - 1), nil
}

// memInfo is a line of proc_meminfo(5), in bytes.
func memInfo(name string) (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		if f := strings.Fields(sc.Text()); len(f) >= 2 && f[0] == name+":" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/meminfo: %s: %w", name, err)
			}
			return kb << 10, nil
		}
	}
	return 0, fmt.Errorf("/proc/meminfo has no %s", name)
}

// cgroupMemory is how much the control groups of this process allow it, and how much of that is left, in bytes; MaxInt64: no limit. Version 2 (memory.max,
// memory.current) and version 1 (memory.limit_in_bytes, memory.usage_in_bytes), for the group and all above it. What cannot be read sets no limit.
func cgroupMemory(self, root string) (most, left int64) {
	most, left = math.MaxInt64, math.MaxInt64
	b, err := os.ReadFile(self)
	if err != nil {
		return most, left
	}
	for line := range strings.Lines(string(b)) {
		part := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(part) != 3 {
			continue
		}
		base, limit, usage := root, "memory.max", "memory.current"
		if part[1] != "" {
			if !strings.Contains(","+part[1]+",", ",memory,") {
				continue
			}
			base, limit, usage = filepath.Join(root, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
		}
		for group := filepath.Join("/", part[2]); ; group = filepath.Dir(group) {
			dir := filepath.Join(base, group)
			if n, ok := readNumber(filepath.Join(dir, limit)); ok {
				used, _ := readNumber(filepath.Join(dir, usage))
				most, left = min(most, n), min(left, max(0, n-used))
			}
			if group == "/" {
				break
			}
		}
	}
	return most, left
}

// readNumber is false for "max", and where there is no such file.
func readNumber(path string) (int64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil
}
