package daemon

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"testing"

	"machpager/pager/emm"
)

// TestCgroupMemory reads made-up control groups of both versions: the tightest limit on the way up counts.
func TestCgroupMemory(t *testing.T) {
	for _, c := range []struct {
		name, self string
		files      map[string]string
		most, want int64
	}{
		{"none", "0::/\n", nil, math.MaxInt64, math.MaxInt64},
		{"no limit", "0::/a/b\n", map[string]string{"a/b/memory.max": "max\n"}, math.MaxInt64, math.MaxInt64},
		{"own", "0::/a/b\n", map[string]string{"a/b/memory.max": "1000\n", "a/b/memory.current": "300\n"}, 1000, 700},
		{"parent's", "0::/a/b\n", map[string]string{"a/b/memory.max": "1000", "a/memory.max": "900", "a/memory.current": "850"}, 900, 50},
		{"exceeded", "0::/a\n", map[string]string{"a/memory.max": "1000", "a/memory.current": "2000"}, 1000, 0},
		{"version 1", "5:cpu,memory:/x\n0::/\n", map[string]string{"memory/x/memory.limit_in_bytes": "500", "memory/x/memory.usage_in_bytes": "100"}, 500, 400},
		{"another controller", "5:cpu:/x\n", map[string]string{"memory/x/memory.limit_in_bytes": "500"}, math.MaxInt64, math.MaxInt64},
		{"garbage", "nothing\n::\n0::/a\n", map[string]string{"a/memory.max": "much"}, math.MaxInt64, math.MaxInt64},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			self := filepath.Join(root, "self")
			write := func(path, text string) {
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write(self, c.self)
			for path, text := range c.files {
				write(filepath.Join(root, path), text)
			}
			if most, left := cgroupMemory(self, root); left != c.want || most != c.most {
				t.Errorf("got %d of %d, want %d of %d", left, most, c.want, c.most)
			}
		})
	}
	if most, left := cgroupMemory("/nonexistent", "/"); most != math.MaxInt64 || left != math.MaxInt64 {
		t.Errorf("without control groups: %d of %d", left, most)
	}
}

func TestHalfOfMemory(t *testing.T) {
	avail, err := memInfo("MemAvailable")
	if err != nil {
		t.Fatal(err)
	}
	n, err := halfOfMemory()
	if err != nil || n < minResident || n > avail*3/4 || n%4096 != 0 {
		t.Errorf("half of %d is %d, %v", avail, n, err)
	}
}

// TestCheck: what no pager could be started with is refused before it is.
func TestCheck(t *testing.T) {
	total, err := memInfo("MemTotal")
	if err != nil {
		t.Fatal(err)
	}
	if limit, _ := cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup"); limit < total {
		total = limit
	}
	for _, c := range []struct {
		c    Config
		want error
	}{
		{Config{}, nil},
		{Config{Store: StoreTiered, Group: "0", Resident: minResident}, nil},
		{Config{Resident: total}, nil},
		{Config{Resident: total + 1}, emm.ResourceShortage},
		{Config{Resident: 100 << 40}, emm.ResourceShortage},
		{Config{Resident: math.MaxInt64}, emm.ResourceShortage},
		{Config{Resident: minResident - 1}, emm.InvalidArgument},
		{Config{Resident: -1}, emm.InvalidArgument},
		{Config{Compressed: -1}, emm.InvalidArgument},
		{Config{Capacity: -1}, emm.InvalidArgument},
		{Config{Store: "tape"}, emm.InvalidArgument},
		{Config{Policy: "fifo"}, nil},
		{Config{Policy: "oracle"}, emm.InvalidArgument},
		{Config{Policy: "clairvoyance"}, emm.InvalidArgument},
		{Config{Confine: "sometimes"}, emm.InvalidArgument},
		{Config{Group: "no-such-group"}, emm.InvalidArgument},
	} {
		if err := c.c.Check(); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%+v: %v, want %v", c.c, err, c.want)
		}
	}
}

func TestOpenStore(t *testing.T) {
	configs := []Config{{Dir: t.TempDir()}, {Store: StoreTiered, Dir: t.TempDir(), Resident: minResident, Compressed: 1 << 20}}
	for _, kind := range Stores {
		for _, capacity := range []int64{0, 1 << 20} {
			configs = append(configs, Config{Store: kind, Dir: t.TempDir(), Resident: minResident, Capacity: capacity})
		}
	}
	for _, c := range configs {
		d := held(t)
		s, backing, err := d.openStore(c, nil)
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		if i := s.Info(); c.Capacity != 0 && i.Total > c.Capacity {
			t.Errorf("%+v: total %d", c, i.Total)
		}
		if files := c.Store == "" || c.Store == StoreFile || c.Store == StoreTiered; files != (backing != nil) || files && len(backing.Files()) != 1 {
			t.Errorf("%+v: paging files: %v", c, backing)
		}
		if err := s.Close(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if _, _, err := held(t).openStore(Config{Store: "tape"}, nil); !errors.Is(err, emm.InvalidArgument) {
		t.Errorf("a store on tape: %v", err)
	}
	if _, _, err := held(t).openStore(Config{Dir: "/nonexistent"}, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a store nowhere: %v", err)
	}
}
