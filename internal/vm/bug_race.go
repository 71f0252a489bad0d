//go:build race

package vm

func init() { panicOnBug = true }
