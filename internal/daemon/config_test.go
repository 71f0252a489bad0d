package daemon

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"testing"

	"machpager/pager/emm"
)

// TestCgroupAvailable reads made-up control groups of both versions: the tightest limit on the way up counts.
func TestCgroupAvailable(t *testing.T) {
	for _, c := range []struct {
		name, self string
		files      map[string]string
		want       int64
	}{
		{"none", "0::/\n", nil, math.MaxInt64},
		{"no limit", "0::/a/b\n", map[string]string{"a/b/memory.max": "max\n"}, math.MaxInt64},
		{"own", "0::/a/b\n", map[string]string{"a/b/memory.max": "1000\n", "a/b/memory.current": "300\n"}, 700},
		{"parent's", "0::/a/b\n", map[string]string{"a/b/memory.max": "1000", "a/memory.max": "900", "a/memory.current": "850"}, 50},
		{"exceeded", "0::/a\n", map[string]string{"a/memory.max": "1000", "a/memory.current": "2000"}, 0},
		{"version 1", "5:cpu,memory:/x\n0::/\n", map[string]string{"memory/x/memory.limit_in_bytes": "500", "memory/x/memory.usage_in_bytes": "100"}, 400},
		{"another controller", "5:cpu:/x\n", map[string]string{"memory/x/memory.limit_in_bytes": "500"}, math.MaxInt64},
		{"garbage", "nothing\n::\n0::/a\n", map[string]string{"a/memory.max": "much"}, math.MaxInt64},
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
			if got := cgroupAvailable(self, root); got != c.want {
				t.Errorf("got %d, want %d", got, c.want)
			}
		})
	}
	if got := cgroupAvailable("/nonexistent", "/"); got != math.MaxInt64 {
		t.Errorf("without control groups: %d", got)
	}
}

func TestHalfOfMemory(t *testing.T) {
	avail, err := memAvailable()
	if err != nil {
		t.Fatal(err)
	}
	n, err := halfOfMemory()
	if err != nil || n < minResident || n > avail*3/4 || n%4096 != 0 {
		t.Errorf("half of %d is %d, %v", avail, n, err)
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
		s, backing, err := openStore(c, nil)
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
	if _, _, err := openStore(Config{Store: "tape"}, nil); !errors.Is(err, emm.InvalidArgument) {
		t.Errorf("a store on tape: %v", err)
	}
	if _, _, err := openStore(Config{Dir: "/nonexistent"}, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a store nowhere: %v", err)
	}
}
