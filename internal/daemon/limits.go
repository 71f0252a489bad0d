package daemon

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
)

// limits bound what one connection, one user, and all together can take of the pager itself. What they can take of the frames is the vm's concern. A
// connection costs three file descriptors (its socket, its userfaultfd, an eventfd) and a thread; an object two (its page table, its file); the
// guardian holds two for a connection.
type limits struct {
	sessions     int // connections at once
	userSessions int // of one user
	objects      int // at once
	handles      int // of one connection
	mappings     int // of one connection

	userObjects  int   // made by one user
	userSpace    int64 // bytes of them; 0: no limit
	userResident int64 // bytes of them that are resident; 0: no limit
	userPaging   int64 // bytes of paging space that they take; 0: no limit
	taskMapped   int64 // bytes mapped by one connection; 0: no limit
	taskFaults   int   // data requests that are out at once for one connection
	taskRequests int   // a second

	mu      sync.Mutex
	all     int            // guarded by mu; connections
	refused int            // guarded by mu; connections that are being told that they are too many
	users   map[uint32]int // guarded by mu; connections by user
}

const (
	maxSessions = 4096  // each has a thread, of which the Go runtime allows 10000
	maxObjects  = 65536 // however many file descriptors there may be
	maxMappings = 8192  // of one connection: each costs the next one that is made or ended a copy of a list
	maxRefused  = 64    // beyond it a connection is closed without a word
)

// init derives the limits from how many file descriptors this process may have (RLIMIT_NOFILE).
func (l *limits) init() {
	files := 1024
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) == nil {
		files = int(min(r.Cur, 1<<20))
	}
	l.set(files)
}

func (l *limits) set(files int) {
	l.sessions = min(maxSessions, max(4, files/16))
	l.userSessions = l.sessions - l.sessions/4
	l.objects = min(maxObjects, max(16, files/4))
	l.handles = l.objects - l.objects/4
	l.mappings = maxMappings
	l.users = map[uint32]int{}
	l.quotas(Quotas{})
}

// enter counts a connection of a user. An error tells which limit is reached; told is whether there is room to say so. leave must follow in any case.
func (l *limits) enter(uid uint32) (leave func(), told bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.all >= l.sessions:
		err = fmt.Errorf("connect: the pager has %d connections, which is its limit (raise its RLIMIT_NOFILE, or end some): %w", l.all, emm.ResourceShortage)
	case l.users[uid] >= l.userSessions:
		err = fmt.Errorf("connect: user %d has %d connections, of %d that the pager allows him (end some, or serve --user-connections): %w", uid, l.users[uid], l.userSessions, emm.ResourceShortage)
	default:
		l.all++
		l.users[uid]++
		return func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.all--
			if l.users[uid]--; l.users[uid] == 0 {
				delete(l.users, uid)
			}
		}, true, nil
	}
	l.refused++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.refused--
	}, l.refused <= maxRefused, err
}

// room is an error if one more than n would be too many.
func room(what string, n, limit int) error {
	if n < limit {
		return nil
	}
	return fmt.Errorf("%d %s already, which is the limit: %w", n, what, emm.ResourceShortage)
}
