package vm

// panicOnBug makes a broken invariant end the process: under the race detector and in this package's tests. In production it is counted.
var panicOnBug bool
