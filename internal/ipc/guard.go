package ipc

// The messages between the pager and its guardian. The guardian knows names and fds only.

// ItemKind says what the guardian holds under a number.
type ItemKind uint32

// The kinds of item.
const (
	ItemTask  ItemKind = 1 + iota // fd: a copy of a task's userfaultfd; ID: the session
	ItemRange                     // no fd; ID: the mapping, Parent: the session, A: address, B: length in bytes, registered on the session's userfaultfd
	ItemArena                     // fd: memory that outlives the pager; name: which
	ItemFile                      // fd: a file that outlives the pager (frames, paging file); name: which
)

// Put gives the guardian something to hold, or replaces what it holds under the same kind and ID. Tail: its name. fds: the fd, for kinds that
// have one. Reply: Empty, when the guardian holds it.
type Put struct {
	Kind   ItemKind
	Pad    uint32
	ID     uint64
	Parent uint64
	A, B   uint64
}

// Drop ends what Put began; dropping an ItemTask drops its ranges. Unknown items are no error. Reply: Empty, when the guardian's fd is closed.
type Drop struct {
	Kind ItemKind
	Pad  uint32
	ID   uint64
}

// TypeReady (Empty) tells the guardian that the pager serves.
// TypeStop (Empty) tells the pager to end; TypeAccept (Empty, fd: a client's socket) gives it a client.
