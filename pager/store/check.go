package store

import "context"

// Checker is a store that can look whether what it keeps about slots fits together, while it is used. It reads no contents.
type Checker interface {
	// Check calls problem for each thing that is wrong, on the caller's goroutine. compared is false if some counts could not be compared, because they changed
	// whenever they were taken. ctx ends it early, with an error.
	Check(ctx context.Context, problem func(what string)) (compared bool, err error)
}
