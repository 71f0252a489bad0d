//go:build !amd64

package store

const wide = false

func sumWide(*byte) uint32 { panic("no such instructions") }
