package daemon

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"machpager/internal/frames"
)

// Config is what a pager is told at its start. It travels from process to process as JSON.
type Config struct {
	Resident   int64       // bytes of memory all objects together may occupy; 0: half of what is available
	Store      string      // where contents go: one of Stores; "": StoreFile
	Dir        string      // of StoreFile and StoreTiered: where the unlinked paging file is made; "": os.TempDir()
	Compressed int64       // bytes of memory that compressed contents may take, beside Resident; 0: of StoreTiered half of Resident, else no limit
	Capacity   int64       // bytes of paging space; 0: no limit of its own
	Frames     frames.Kind // 0: the best that works
	Socket     string      // listen here; "": do not
	Group      string      // name or number of the group that may use Socket; "": the user alone
	GiveDevice bool        // hand an open /dev/userfaultfd to tasks that ask for it: what the sysctl vm.unprivileged_userfaultfd withholds
}

// minPages is the smallest budget, in pages of any object: what one instruction can need at once, and as many more.
const minPages = 8

// minResident is the smallest budget, in bytes.
const minResident = minPages * frames.PageSize

// minCompressed is the least compressed memory that StoreTiered takes by itself, in bytes: slabs of each size and a reserve.
const minCompressed = 4 << 20

// halfOfMemory is half of the memory that this process could have, in bytes: of what the machine has available and what every control group
// above this process leaves.
func halfOfMemory() (int64, error) {
	avail, err := memAvailable()
	if err != nil {
		return 0, fmt.Errorf("find out how much memory there is (or say how much may be resident): %w", err)
	}
	n := min(avail, cgroupAvailable("/proc/self/cgroup", "/sys/fs/cgroup"))
	return max(n/2, minResident) &^ (frames.PageSize - 1), nil
}

// memAvailable is MemAvailable of proc_meminfo(5), in bytes.
func memAvailable() (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		if f := strings.Fields(sc.Text()); len(f) >= 2 && f[0] == "MemAvailable:" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/meminfo: MemAvailable: %w", err)
			}
			return kb << 10, nil
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}

// cgroupAvailable is how much the control groups of this process leave it, in bytes; MaxInt64: no limit. Version 2 (memory.max, memory.current) and
// version 1 (memory.limit_in_bytes, memory.usage_in_bytes), for the group and all above it. What cannot be read sets no limit.
func cgroupAvailable(self, root string) int64 {
	b, err := os.ReadFile(self)
	if err != nil {
		return math.MaxInt64
	}
	least := int64(math.MaxInt64)
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
			if most, ok := readNumber(filepath.Join(dir, limit)); ok {
				used, _ := readNumber(filepath.Join(dir, usage))
				least = min(least, max(0, most-used))
			}
			if group == "/" {
				break
			}
		}
	}
	return least
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
