package daemon

import (
	"errors"
	"testing"

	"machpager/pager/emm"
)

func TestLimits(t *testing.T) {
	var l limits
	l.set(128)
	if l.sessions != 8 || l.userSessions != 6 {
		t.Fatalf("%d connections, %d of one user", l.sessions, l.userSessions)
	}
	var leaves []func()
	enter := func(uid uint32, want error) {
		t.Helper()
		leave, told, err := l.enter(uid)
		if !errors.Is(err, want) || !told {
			t.Fatalf("%v, told %v, want %v", err, told, want)
		}
		if err == nil {
			leaves = append(leaves, leave)
		} else {
			leave()
		}
	}
	for range 6 {
		enter(1, nil)
	}
	enter(1, emm.ResourceShortage) // a user cannot take what others need
	enter(2, nil)
	enter(3, nil)
	enter(4, emm.ResourceShortage)
	leaves[0]()
	leaves = leaves[1:]
	enter(1, nil)
	for _, leave := range leaves {
		leave()
	}
	if l.all != 0 || len(l.users) != 0 || l.refused != 0 {
		t.Errorf("left: %d, %v, %d", l.all, l.users, l.refused)
	}
	l.set(1 << 20)
	for range l.sessions {
		l.enter(uint32(l.all))
	}
	var done []func()
	for i := range maxRefused + 1 {
		leave, told, err := l.enter(9)
		if err == nil || told != (i < maxRefused) {
			t.Fatalf("refusal %d: told %v, %v", i, told, err)
		}
		done = append(done, leave)
	}
	for _, leave := range done {
		leave()
	}
	if l.refused != 0 {
		t.Error(l.refused)
	}
}
