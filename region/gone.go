//go:build linux

package region

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"machpager/uffd"
)

// poisonStep is how much of a range one ioctl poisons: the lock on the address space is free in between.
const poisonStep = 2 << 20

// poisonMax bounds what is poisoned in all, in bytes of address space: every 2 MiB costs this process a page table. What is beyond, the
// guardian alone answers for, fault by fault.
const poisonMax = 16 << 30

// watch waits for the end of the connection. If the pager ended it, every page that is missing is poisoned, so that who waits for it, or touches it, gets an
// error, never zeros, and no hang. The guardian does the same from outside, and must: this goroutine does not run while the collector waits
// for another one in a fault. It only makes system calls, touches no region memory, and takes no messages from the guardian.
func (p *Pager) watch() {
	defer close(p.watched)
	<-p.link.Done()
	if !p.gone() {
		return
	}
	p.mu.Lock()
	regions := make([]*Region, 0, len(p.regions))
	for r := range p.regions {
		regions = append(regions, r)
	}
	p.mu.Unlock()
	left := int64(poisonMax)
	for _, r := range regions {
		if left -= int64(len(r.mem)); left < 0 {
			return
		}
		r.poison()
	}
}

// poison makes every page of the region that has no entry an error, and wakes who waits.
func (r *Region) poison() {
	if r.enter() != nil {
		return // closed: who waited is woken
	}
	defer r.leave()
	start, size := r.address(), uint64(len(r.mem))
	if !r.readOnly {
		// Resident pages stay usable. It also clears protection markers on absent ones, which would keep poison off.
		r.settle(func() error { return r.fd.WriteProtect(start, size, uffd.WriteProtectDontWake) })
	}
	for off := uint64(0); off < size && !r.closing.Load(); {
		n := min(size-off, poisonStep)
		var done int64
		err := r.settle(func() error {
			var err error
			done, err = r.fd.Poison(start+off, n, uffd.PoisonDontWake)
			if done > 0 {
				return nil // go on behind it
			}
			return err
		})
		off += uint64(done)
		switch {
		case err == nil:
		case errors.Is(err, unix.EEXIST):
			off += systemPage // resident, or poisoned already
		default:
			off += n // unmapped under us, or no memory for the markers: the wake lets who waits look again
		}
	}
	r.fd.Wake(start, size)
}

// systemPage is the unit of page table entries, whatever the object's page size.
const systemPage = 4096

// settle repeats do while the kernel says that an event (of mremap) must be read first. The guardian reads it. This process must not: with events come
// faults, and a fault that was read here, by a goroutine that the collector then stops, would be answered by nobody.
func (r *Region) settle(do func() error) error {
	for tries := 0; ; tries++ {
		err := do()
		if !errors.Is(err, unix.EAGAIN) || tries == 100 || r.closing.Load() {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}
