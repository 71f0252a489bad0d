// Package ipc carries the messages between a task and the pager, and between the pager and its guardian: frames with file descriptors on a
// SOCK_SEQPACKET unix socket. PROTOCOL.md beside it draws the frames.
//
// Three layers, each usable alone:
//
//	Conn     one socket: Send and Recv of whole frames with their fds, peer credentials
//	message  the fixed structs that are the protocol (task.go, guard.go), and the table of what each type may carry (types.go)
//	Link     one end of a conversation: calls with many in flight, and serves the other end's calls (link.go, serve.go); goes on with another pager
//	         when one dies (resume.go)
//
// # Errors
//
// A call that was refused by the other end fails with a *[RemoteError], which errors.Is finds equal to the emm.KernReturn and to the
// unix.Errno the other end gave. A call on a connection that ended fails with [ErrGone] (the other end went) or [ErrClosed] (Close here).
// What a peer sends can never make this package panic or allocate beyond one frame per request in flight.
//
// # File descriptors
//
// What is received is close-on-exec and belongs to the [Message]: TakeFD hands one over, Close closes the rest. What is sent stays the
// sender's, who keeps it open until Send or Call returns.
//
// # Lock order
//
//	Link.mu (pending calls, requests in flight)   leaf
//	Conn.send (a channel of one slot)             leaf, never taken under Link.mu
package ipc

import "errors"

// Version is the version of the protocol, in every header. The header's layout is the same in all versions.
const Version = 1

// Limits of one frame.
const (
	MaxFrame = 64 << 10              // bytes, header included
	MaxBody  = MaxFrame - HeaderSize // bytes of a body with its tail
	MaxFDs   = 2                     // file descriptors
)

// DefaultInFlight is how many requests of one peer are served at once.
const DefaultInFlight = 128

// What ends a connection or refuses a frame.
var (
	// ErrGone says that the other end of the connection is gone: it ended, was killed, or closed it.
	ErrGone = errors.New("the other end of the connection is gone")
	// ErrClosed says that this end was closed.
	ErrClosed = errors.New("connection closed")
	// ErrVersion says that the two ends speak different versions of the protocol.
	ErrVersion = errors.New("protocol version mismatch")
	// ErrMalformed says that a frame is not what its type promises: length, number or kind of fds, contents.
	ErrMalformed = errors.New("malformed message")
	// ErrUnknown says that a message type is not known, or not served on this connection.
	ErrUnknown = errors.New("unknown message type")
)
