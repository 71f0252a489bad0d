//go:build race

package sim

// capacities that policies are compared at, in frames. A simulation has one goroutine: there is nothing to find but time to lose.
var capacities = []int64{128}
