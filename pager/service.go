package pager

import (
	"fmt"

	"machpager/pager/emm"
)

// ObjectCreate makes a zero-filled memory object of size bytes (default_pager_object_create). The default pager is the receiver of port from now
// on, until NoSenders. pageSize is a power of two from 4096 to 2 MiB; size is rounded up to whole pages, and nothing beyond it is kept.
// Errors: InvalidArgument (also for a port that is taken), ResourceShortage.
func (p *Pager) ObjectCreate(port emm.Port, size int64, pageSize int) error {
	if _, err := p.create(entry{port: port, size: size, pageSize: int64(pageSize)}); err != nil {
		return fmt.Errorf("create object of %d bytes, page size %d: %w", size, pageSize, err)
	}
	return nil
}

// NoSenders says that no right to the object is left but the receiver's (Mach: the no-senders notification): its contents end. If a vm has the object, at its
// Terminate. Success, or InvalidArgument for a port that is none of the default pager's.
func (p *Pager) NoSenders(port emm.Port) emm.KernReturn {
	o := p.lookup(port)
	if o == nil {
		return emm.InvalidArgument
	}
	o.mu.Lock()
	o.doomed = true
	end := o.att == nil
	o.mu.Unlock()
	if end {
		p.end(o)
	}
	return emm.Success
}

// Has reports whether the port is one of the default pager's: made by ObjectCreate or a snapshot, or taken over with Create.
func (p *Pager) Has(port emm.Port) bool { return p.lookup(port) != nil }

// Claim ends the objects that no vm has and that claimed does not know: who takes over from an earlier process calls it once, when all that it found are
// attached or known. It returns how many objects ended. Ports are told to nobody else.
func (p *Pager) Claim(claimed func(port emm.Port) bool) (ended int) {
	p.mu.Lock()
	ports := make([]emm.Port, 0, len(p.objects))
	for port := range p.objects {
		ports = append(ports, port)
	}
	p.mu.Unlock()
	for _, port := range ports {
		o := p.lookup(port)
		if o == nil || claimed(port) {
			continue
		}
		o.mu.Lock()
		end := o.att == nil && !o.doomed
		o.doomed = o.doomed || end
		o.mu.Unlock()
		if end {
			p.end(o)
			ended++
		}
	}
	return ended
}

func (p *Pager) lookup(port emm.Port) *object {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.objects[port]
}

// ObjectInfo describes one object. It does not tell the port.
type ObjectInfo struct {
	ID        int   // small number, reused after the object's end
	Size      int64 // bytes, whole pages; 0 if not known: of a temporary object that the vm made, and of its snapshots
	PageSize  int   // bytes
	Stored    int64 // bytes in paging space; shared ones count for each object
	Temporary bool  // made by the vm (memory_object_create)
	Attached  bool  // a vm has it: between Init and Terminate
}

// Objects lists the objects there are (default_pager_objects).
func (p *Pager) Objects() []ObjectInfo {
	p.mu.Lock()
	live := make([]*object, 0, len(p.objects))
	for _, o := range p.ids {
		if o != nil && p.objects[o.port] == o {
			live = append(live, o)
		}
	}
	p.mu.Unlock()
	infos := make([]ObjectInfo, len(live))
	for i, o := range live {
		o.mu.Lock()
		infos[i] = ObjectInfo{ID: o.id, Size: o.size, PageSize: int(o.pageSize), Stored: o.stored * o.pageSize, Temporary: o.temporary, Attached: o.att != nil}
		o.mu.Unlock()
		if o.size == maxObject {
			infos[i].Size = 0
		}
	}
	return infos
}

// ObjectPages lists the runs of an object's pages that are in paging space (default_pager_object_pages).
func (p *Pager) ObjectPages(port emm.Port) ([]emm.Run, error) {
	o := p.lookup(port)
	if o == nil {
		return nil, fmt.Errorf("list pages of object: %w", emm.InvalidArgument)
	}
	var runs []emm.Run
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gone { // the map may be closed
		return nil, fmt.Errorf("list pages of object: %w", emm.InvalidObject)
	}
	for c, count := range o.counts {
		if count == 0 {
			continue
		}
		for i := int64(c) * chunkPages; i < min(int64(c+1)*chunkPages, int64(len(o.words))); i++ {
			if o.words[i].Load() == 0 {
				continue
			}
			if k := len(runs) - 1; k >= 0 && runs[k].End() == i*o.pageSize {
				runs[k].Size += o.pageSize
			} else {
				runs = append(runs, emm.Run{Off: i * o.pageSize, Size: o.pageSize})
			}
		}
	}
	return runs, nil
}

// Info is what default_pager_info tells, in bytes. What objects share counts once: the sum of ObjectInfo.Stored may be more than Used.
type Info struct {
	Total, Used, Free int64
	PageSize          int // the smallest unit of paging space
}

// Info tells about paging space (default_pager_info).
func (p *Pager) Info() Info {
	i := p.store.Info()
	return Info{Total: i.Total, Used: i.Used, Free: i.Free, PageSize: MinPageSize}
}
