package ipc

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
)

// Status begins the body of every reply. All three numbers 0: success, and the reply's own body follows. Otherwise TextLen bytes of text follow, and
// nothing else.
type Status struct {
	Kern    int32  // kern_return_t
	Errno   int32  // errno
	Code    uint32 // what is neither: see codes
	TextLen uint32
}

const statusSize = 16

// codes are the errors that are neither kern_return_t nor errno. Their places are the protocol.
var codes = []error{1: ErrVersion, 2: ErrMalformed, 3: ErrUnknown, 4: context.Canceled, 5: context.DeadlineExceeded, 6: ErrClosed}

// RemoteError is a refusal by the other end. errors.Is finds its KernReturn, its Errno, and the errors of this package and of context.
type RemoteError struct {
	Type  Type           // of the request
	Kern  emm.KernReturn // Success: none given
	Errno unix.Errno     // 0: none given
	Text  string         // what the other end says
	code  error          // one of codes, or nil
}

// Error is the text of the other end: it names the request, the cause, and the remedy.
func (e *RemoteError) Error() string {
	if e.Text != "" {
		return e.Text
	}
	return fmt.Sprintf("%v: refused: %v, errno %d", e.Type, e.Kern, int(e.Errno))
}

// Unwrap gives what the other end's error was made of.
func (e *RemoteError) Unwrap() []error {
	var errs []error
	if e.Kern != emm.Success {
		errs = append(errs, e.Kern)
	}
	if e.Errno != 0 {
		errs = append(errs, e.Errno)
	}
	if e.code != nil {
		errs = append(errs, e.code)
	}
	return errs
}

// statusOf splits an error for the wire. nil is success.
func statusOf(err error) (Status, string) {
	var s Status
	if err == nil {
		return s, ""
	}
	var k emm.KernReturn
	if errors.As(err, &k) {
		s.Kern = int32(k)
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		s.Errno = int32(errno)
	}
	for i, c := range codes {
		if c != nil && errors.Is(err, c) {
			s.Code = uint32(i)
			break
		}
	}
	if s.Kern == 0 && s.Errno == 0 && s.Code == 0 {
		s.Kern = int32(emm.Failure)
	}
	text := err.Error()
	if len(text) > maxText {
		text = text[:maxText]
	}
	s.TextLen = uint32(len(text))
	return s, text
}

// maxText bounds the text of an error on the wire, in bytes.
const maxText = 4096

// parseReply splits a reply's body: the rest of a success, or the error.
func parseReply(t Type, body []byte) (rest []byte, err error) {
	s, rest, err := Decode[Status](body)
	if err != nil {
		return nil, fmt.Errorf("reply to %v: %w", t, err)
	}
	if s == (Status{}) {
		return rest, nil
	}
	if s.TextLen > maxText || int(s.TextLen) != len(rest) {
		return nil, fmt.Errorf("reply to %v: %d bytes of text, %d came: %w", t, s.TextLen, len(rest), ErrMalformed)
	}
	e := &RemoteError{Type: t, Kern: emm.KernReturn(s.Kern), Errno: unix.Errno(s.Errno), Text: string(rest)}
	if int(s.Code) < len(codes) {
		e.code = codes[s.Code]
	}
	return nil, e
}
