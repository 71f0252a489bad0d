//go:build linux

package bench

import (
	"os"
	"testing"

	"machpager/region/spawn"
)

func TestMain(m *testing.M) {
	spawn.Main()
	Main()
	os.Exit(m.Run())
}
