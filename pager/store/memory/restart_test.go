package memory_test

import (
	"testing"

	"machpager/pager/store"
	"machpager/pager/store/memory"
	"machpager/pager/store/storetest"
)

func TestKilled(t *testing.T) {
	const capacity = 4096 // so that there is something to be given back
	storetest.Restart{
		Memories: []string{"contents"},
		Open: func(l *storetest.Lasting) (store.Store, error) {
			mem, err := l.Memory("contents")
			if err != nil {
				return nil, err
			}
			return memory.New(mem, &memory.Options{Capacity: capacity * store.SlotSize, Slack: -1})
		},
		Capacity:   capacity,
		Failpoints: []string{"memory.grown", "memory.summed", "memory.copied", "memory.discard", "memory.discarded"},
	}.Run(t)
}
