//go:build !race

package sim

// capacities that policies are compared at, in frames.
var capacities = []int64{128, 512, 2048}
