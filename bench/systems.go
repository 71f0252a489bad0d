//go:build linux

package bench

// The names of the systems, in the order of the report.
const (
	Machpager    = "machpager"
	Floor        = "C floor"
	FloorBlock   = "C floor (blocking read)"
	FloorExtents = "C floor (pwrite+CONTINUE)"
	Mapper       = "userfaultfd-go"
	Anon         = "kernel anonymous"
	Memfd        = "kernel memfd"
	Read         = "read(2) into fresh memory"
	File         = "mmap of a cached file"
)

// Systems are the names of all systems.
var Systems = []string{Machpager, Floor, FloorBlock, FloorExtents, Mapper, Anon, Memfd, Read, File}

// systems makes those that the driver's hello allows.
func systems(h hello) (map[string]system, error) {
	src, err := newCachedFile(h.Dir, h.Size)
	if err != nil {
		return nil, err
	}
	m := map[string]system{
		Mapper: mapperSystem{},
		Anon:   anonSystem{},
		Memfd:  memfdSystem{},
		Read:   readSystem{src},
		File:   fileSystem{src},
	}
	if h.Pagers != nil {
		if m[Machpager], err = dialPagers(h.Pagers); err != nil {
			return nil, err
		}
	}
	if h.Floor != "" {
		m[Floor] = floorSystem{h.Floor, floorPoll}
		m[FloorBlock] = floorSystem{h.Floor, 0}
		m[FloorExtents] = floorSystem{h.Floor, floorPoll | floorPwrite}
	}
	return m, nil
}
