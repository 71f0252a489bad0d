package ipc

// The messages between the pager and its guardian. The guardian knows names and fds only.

// ItemKind says what the guardian holds under a number.
type ItemKind uint32

// The kinds of item that the guardian itself understands.
const (
	ItemTask   ItemKind = 1 + iota // fd: a copy of a task's userfaultfd; ID: the session
	ItemRange                      // no fd; ID: the mapping, Parent: the session, A: address, B: length in bytes, registered on the session's userfaultfd
	ItemSocket                     // fd: a copy of a task's socket; ID: the session
	ItemState                      // no fd; ID: 0; what kind of state the items are, for the program of an upgrade to look at before
	ItemEnd                        // no fd, and not held: the task of the session ID has left the pager while its memory may live on
)

// The kinds of item that only the pager understands: the guardian gives them to the next pager as they are. Any may have an fd.
const (
	ItemListen      ItemKind = 64 + iota // the listening socket
	ItemMount                            // the file system of the frames
	ItemArena                            // memory that outlives the pager; Tail: its name
	ItemFrameFile                        // the frames of an object; ID: the object
	ItemObject                           // ID: the object
	ItemHandle                           // Parent: the session
	ItemMapping                          // ID: the mapping; Parent: the session
	ItemWire                             // Parent: the mapping
	ItemSetting                          // what an operator has changed
	ItemPagingFile                       // ID: its number
	ItemManagerFile                      // the file behind an object of a memory manager; ID: the object
	itemKindEnd
)

// Kept reports whether the kind is one that only the pager understands.
func (k ItemKind) Kept() bool { return k >= ItemListen && k < itemKindEnd }

// MaxItemTail is how long the tail of an item can be, in bytes.
const MaxItemTail = 4 << 10

// Put gives the guardian something to hold, or replaces what it holds under the same kind and ID. Tail: what the pager wants to know of it again. fds: the fd,
// for kinds that have one. Reply: Empty, when the guardian holds it.
type Put struct {
	Kind   ItemKind
	Pad    uint32
	ID     uint64
	Parent uint64
	A, B   uint64
}

// Drop ends what Put began; dropping an ItemTask drops its socket and its ranges. Unknown items are no error. Reply: Empty, when the guardian's fd is closed.
type Drop struct {
	Kind ItemKind
	Pad  uint32
	ID   uint64
}

// Give gives a new pager one item that the guardian holds, as it was put. Several are under way at once; Order, which counts from 0, is the order in
// which they were put first.
type Give struct {
	Kind   ItemKind
	Order  uint32
	ID     uint64
	Parent uint64
	A, B   uint64
}

// Given says that this was all: Count items. It comes once on each link, and the pager may call Put and Drop from then on.
type Given struct {
	Count uint32
	Pad   uint32
}

// Resize sets the size of the tmpfs that is fd 0; fd 1, if there, is of fspick(2), for it. The pager has given up the capability for it. Only the tmpfs of the first
// such request is ever resized. Reply: Empty.
type Resize struct{ Size int64 }

// TypeOffer (Give of an ItemState) asks a new program whether it could take over; an error says why not. TypeReplace (Empty) asks the guardian for an
// upgrade; its only reply is an error. TypeReady (Empty) tells the guardian that the pager serves. TypeStop (Empty) tells the pager to end.
