//go:build linux

package uffd

import "testing"

func TestStrings(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{(&Msg{event: EventPagefault, arg: [3]uint64{uint64(FaultWrite), 0x1000, 7}}).String(), "missing write fault at 0x1000 by thread 7"},
		{(&Msg{event: EventPagefault, arg: [3]uint64{uint64(FaultMinor), 0x1000, 7}}).String(), "minor read fault at 0x1000 by thread 7"},
		{(&Msg{event: EventPagefault, arg: [3]uint64{uint64(FaultWrite | FaultWP), 0x1000, 7}}).String(), "write-protect fault at 0x1000 by thread 7"},
		{(&Msg{event: EventFork, arg: [3]uint64{9}}).String(), "fork, fd 9"},
		{(&Msg{event: EventRemap, arg: [3]uint64{0x1000, 0x2000, 4096}}).String(), "remap 0x1000+4096 to 0x2000"},
		{(&Msg{event: EventRemove, arg: [3]uint64{0x1000, 0x2000}}).String(), "remove [0x1000, 0x2000)"},
		{(&Msg{event: EventUnmap, arg: [3]uint64{0x1000, 0x2000}}).String(), "unmap [0x1000, 0x2000)"},
		{(&Msg{event: 1}).String(), "event 0x1"},
		{Features(0).String(), "0x0"},
		{(FeaturePoison | FeatureMove | 1<<40).String(), "POISON|MOVE|0x10000000000"},
	} {
		if c.got != c.want {
			t.Errorf("%q, want %q", c.got, c.want)
		}
	}
}
