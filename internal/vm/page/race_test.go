//go:build race

package page

// raceEnabled: the model runs on one goroutine, there is nothing to find but time to lose.
const raceEnabled = true
