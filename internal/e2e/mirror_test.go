package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"machpager/pager/emm"
	"machpager/region"
)

func init() { tasks["mirror"] = using(mirror) }

// op is one step of one task.
type op struct {
	Kind     opKind
	Off, N   int64
	Contents uint64 // version for fill; which advice
	Shrunk   bool   // another task makes the object smaller at the same time
}

type opKind int

const (
	opRead      opKind = iota // through Bytes
	opReadAt                  // through ReadAt
	opWrite                   // through Bytes
	opWriteAt                 // through WriteAt
	opPageOut                 //
	opPopulate                // for reading
	opPopulateW               // for writing
	opRemap                   // unmap and map again
	opDiscard                 // of the whole pages inside
	opAdvise                  // Contents names the advice
	opSync                    //
	opWire                    // and unwire
	opSnapshot                // and read it
	opReadOnly                // read through a second, read-only mapping
	opSetSize                 // to Off, and back to what it was
	opEnd
)

var opNames = [...]string{"Read", "ReadAt", "Write", "WriteAt", "PageOut", "Populate", "PopulateWrite", "Remap", "Discard", "Advise", "Sync", "Wire", "Snapshot", "ReadOnly", "SetSize", "End"}

func (o op) String() string { return fmt.Sprintf("%s(%#x, %#x)", opNames[o.Kind], o.Off, o.N) }

type opResult struct {
	Data  []byte // of reads
	Err   string
	Again int // times that the store failed, and it was done again
}

type mirrorArg struct {
	At
	Port     emm.Port // null: make an object
	Size     int64
	PageSize int
	Failing  bool // the store fails now and then
}

// mirror maps an object and does what it is told.
func mirror(ctx context.Context, c *conn, p *region.Pager, arg mirrorArg) error {
	o, r, err := share(ctx, p, arg.Port, arg.Size, &region.ObjectOptions{PageSize: arg.PageSize})
	if err != nil {
		return err
	}
	if err := c.send(o.Port()); err != nil {
		return err
	}
	for {
		var o1 op
		if err := c.recv(&o1); err != nil {
			return err
		}
		if o1.Kind == opEnd {
			return firstOf(r.Close(), o.Close())
		}
		var res opResult
		once := func() (err error) {
			switch o1.Kind {
			case opRead:
				res.Data = bytes.Clone(r.Bytes()[o1.Off : o1.Off+o1.N])
			case opReadAt:
				res.Data = make([]byte, o1.N)
				_, err = r.ReadAt(res.Data, o1.Off)
			case opWrite:
				fill(r.Bytes()[o1.Off:o1.Off+o1.N], o1.Off, o1.Contents)
			case opWriteAt:
				b := make([]byte, o1.N)
				fill(b, o1.Off, o1.Contents)
				_, err = r.WriteAt(b, o1.Off)
			case opPageOut:
				err = r.PageOut(ctx, o1.Off, o1.N)
			case opPopulate, opPopulateW:
				err = r.Populate(ctx, o1.Off, o1.N, o1.Kind == opPopulateW)
			case opDiscard:
				err = r.Discard(ctx, o1.Off, o1.N)
			case opAdvise:
				err = r.Advise(ctx, o1.Off, o1.N, region.Advice(o1.Contents%6))
			case opSync:
				err = r.Sync(ctx, o1.Off, o1.N)
			case opWire:
				if err = r.Wire(ctx, o1.Off, o1.N); err == nil {
					err = r.Unwire(ctx, o1.Off, o1.N)
				}
			case opSnapshot:
				var s *region.Object
				if s, err = o.Snapshot(ctx); err == nil {
					res.Data, err = readObject(ctx, s, o1.Off, o1.N)
					err = firstOf(err, s.Close())
				}
			case opReadOnly:
				res.Data, err = readObject(ctx, o, o1.Off, o1.N)
			case opSetSize:
				if err = o.SetSize(ctx, o1.Off); err == nil {
					err = o.SetSize(ctx, arg.Size)
				}
			case opRemap:
				if err = r.Close(); err == nil {
					r, err = o.Map(ctx, nil)
				}
			}
			if ahead := o1.Kind == opWire || o1.Kind == opPopulate || o1.Kind == opPopulateW; ahead && errors.Is(err, emm.ResourceShortage) ||
				ahead && o1.Shrunk && errors.Is(err, emm.MemoryError) {
				return nil // more than the budget, or beyond the end: that is the answer
			}
			return err
		}
		if arg.Failing {
			res.Again, err = despite(once)
		} else {
			err = once()
		}
		if err != nil {
			res.Err = err.Error()
		}
		if err := c.send(res); err != nil {
			return err
		}
	}
}

// readObject reads through a read-only mapping of its own.
func readObject(ctx context.Context, o *region.Object, off, n int64) ([]byte, error) {
	r, err := o.Map(ctx, &region.MapOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	b := bytes.Clone(r.Bytes()[off : off+n])
	return b, r.Close()
}
