//go:build !cgo

package confine

const linkedWithCgo = false
