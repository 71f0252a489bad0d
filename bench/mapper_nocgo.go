//go:build linux && !cgo

package bench

import (
	"errors"
	"fmt"
)

// mapperSystem is userfaultfd-go, which needs cgo.
type mapperSystem struct{}

const haveMapper = false

func (mapperSystem) open(workload) (*target, error) {
	return nil, fmt.Errorf("%w: needs cgo: build with CGO_ENABLED=1", errNone)
}

func mapperMain([]string) error { return errors.New("built without cgo") }
