//go:build linux

package bench

import (
	"fmt"
	"io"
	"math/bits"
	"math/rand/v2"
	"os"
	"unsafe"
)

// graph is an undirected graph in compressed sparse rows: the neighbours of vertex v are edges[offsets[v]:offsets[v+1]].
type graph struct {
	offsets []uint64
	edges   []uint32
}

// graphSpec says how a graph lies in memory and in a file, and what a search in it must find.
type graphSpec struct {
	Name     string // of the file
	Vertices int
	Edges    int    // entries of the rows: two for each edge
	Sum      uint64 // of a breadth-first search from vertex Root, see graph.search
	Root     int
}

func (s graphSpec) size() int64 {
	return (int64(s.Vertices+1)*8 + int64(s.Edges)*4 + pageSize - 1) &^ (pageSize - 1)
}

// in is the graph that lies in mem.
func (s graphSpec) in(mem []byte) graph {
	at := (s.Vertices + 1) * 8
	return graph{words(mem)[:s.Vertices+1], unsafe.Slice((*uint32)(unsafe.Pointer(unsafe.SliceData(mem[at:]))), s.Edges)}
}

// degree is the number of edges that R-MAT makes for a vertex.
const degree = 8

// makeGraph makes an R-MAT graph (a, b, c, d = 0.57, 0.19, 0.19, 0.05, as the Graph500 has it; vertices renumbered) that takes about size bytes,
// writes it to a file, and searches it once.
func makeGraph(name string, size int64) (_ graphSpec, err error) {
	scale := max(4, bits.Len64(uint64(size/(degree*2*4+8)))-1)
	s := graphSpec{Name: name, Vertices: 1 << scale}
	ends := rmat(scale, s.Vertices*degree)
	s.Edges = len(ends)
	mem := make([]byte, s.size())
	g := s.in(mem)
	for i := 0; i < len(ends); i += 2 {
		g.offsets[ends[i]+1]++
		g.offsets[ends[i+1]+1]++
	}
	most := uint64(0)
	for v := range s.Vertices {
		if g.offsets[v+1] > most { // still its degree
			most, s.Root = g.offsets[v+1], v
		}
		g.offsets[v+1] += g.offsets[v]
	}
	next := make([]uint64, s.Vertices)
	copy(next, g.offsets)
	for i := 0; i < len(ends); i += 2 {
		a, b := ends[i], ends[i+1]
		g.edges[next[a]], g.edges[next[b]] = b, a
		next[a]++
		next[b]++
	}
	s.Sum, _ = g.search(s.Root)
	return s, os.WriteFile(name, mem, 0o600)
}

// rmat makes n edges between 1<<scale vertices.
func rmat(scale, n int) []uint32 {
	r := rand.New(rand.NewPCG(3, 4))
	mask := uint32(1)<<scale - 1
	renumber := func(v uint32) uint32 { // a permutation
		v = v * 0x9E3779B1 & mask
		v ^= v >> ((scale + 1) / 2)
		return v * 0x85EBCA6B & mask
	}
	ends := make([]uint32, 0, 2*n)
	for range n {
		var a, b uint32
		var random uint64
		for level := range scale {
			if level%4 == 0 {
				random = r.Uint64()
			}
			switch x := random & 0xffff; {
			case x < 37356: // 0.57
				a, b = a<<1, b<<1
			case x < 49807: // 0.19
				a, b = a<<1, b<<1|1
			case x < 62259: // 0.19
				a, b = a<<1|1, b<<1
			default:
				a, b = a<<1|1, b<<1|1
			}
			random >>= 16
		}
		ends = append(ends, renumber(a), renumber(b))
	}
	return ends
}

// search is a breadth-first search level by level, each in the order of vertices. It returns a sum of all distances, and how many edges it followed.
func (g graph) search(root int) (sum uint64, followed int64) {
	n := len(g.offsets) - 1
	seen, now, next := make([]uint64, (n+63)/64), make([]uint64, (n+63)/64), make([]uint64, (n+63)/64)
	seen[root/64] |= 1 << (root % 64)
	now[root/64] |= 1 << (root % 64)
	for level, more := uint64(1), true; more; level++ {
		more = false
		for i, set := range now {
			for ; set != 0; set &= set - 1 {
				v := i*64 + bits.TrailingZeros64(set)
				row := g.edges[g.offsets[v]:g.offsets[v+1]]
				followed += int64(len(row))
				for _, u := range row {
					if bit := uint64(1) << (u % 64); seen[u/64]&bit == 0 {
						seen[u/64] |= bit
						next[u/64] |= bit
						sum += level * (uint64(u)*stampStep | 1)
						more = true
					}
				}
			}
		}
		now, next = next, now
		clear(next)
	}
	return sum, followed
}

// load reads the graph's file into mem.
func (s graphSpec) load(mem []byte) error {
	f, err := os.Open(s.Name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.ReadFull(f, mem[:s.size()]); err != nil {
		return fmt.Errorf("read graph: %w", err)
	}
	return nil
}
