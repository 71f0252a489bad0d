package ipc

import (
	"encoding/binary"
	"fmt"
)

// Type says what a frame is. A reply has the type of its request.
type Type uint16

// The types. 1 to 63: task to pager; 64 to 95: pager to guardian; 96 to 127: guardian to pager; 128: either way; 160 to 191: pager to task.
const (
	TypeHello Type = 1 + iota
	TypeTaskUffd
	TypeObjectCreate
	TypeAllocate
	TypeObjectOpen
	TypeObjectClose
	TypeObjects
	TypeObjectPages
	TypeMap
	TypeMapReady
	TypeUnmap
	TypePopulate
	TypePageOut
	TypeFaultReason
	TypeRegionStats
	TypeInfo
	TypeSync
	TypeAdvise
	TypeWire
	TypeUnwire
	TypeDiscard
	TypeObjectSetSize
	TypeSetResident
	TypeObjectSnapshot
	TypeBackingStoreCreate
	TypeBackingStoreDelete
	TypeBackingStoreInfo

	TypeObjectRight  Type = 40
	TypeObjectRevoke Type = 41

	TypeUpgrade Type = 48
	TypeDump    Type = 49
	TypeCheck   Type = 50

	TypePut     Type = 64
	TypeDrop    Type = 65
	TypeReady   Type = 66
	TypeReplace Type = 67
	TypeResize  Type = 68

	TypeStop  Type = 96
	TypeGive  Type = 97
	TypeGiven Type = 98
	TypeOffer Type = 99

	TypeCancel Type = 128

	TypeRestarted Type = 160
)

// Tail says what follows the fixed part of a body.
type Tail uint8

// The kinds of tail.
const (
	TailNone    Tail = iota // nothing
	TailText                // UTF-8 text to the end
	TailBytes               // bytes to the end
	TailStrings             // strings, each u16 length and bytes: see AppendStrings
	TailList                // fixed structs to the end: see AppendList
)

// Kind says what a file descriptor must be.
type Kind uint8

// The kinds of fd. The receiver verifies them.
const (
	KindAny    Kind = iota // anything
	KindUffd               // a userfaultfd
	KindFile               // a regular file or a block device
	KindDevice             // a character device
	KindSocket             // a socket
)

// Shape is what a frame of one type and direction may carry.
type Shape struct {
	Fixed          any  // zero value of the fixed struct
	Tail           Tail // what follows it
	MinFDs, MaxFDs int
	Kind           Kind // of every fd
}

// spec is one row of the protocol.
type spec struct {
	name    string
	request Shape
	reply   Shape
	oneWay  bool // no reply
}

var specs = map[Type]spec{
	TypeHello:    {name: "Hello", request: Shape{Fixed: Hello{}}, reply: Shape{Fixed: HelloReply{}, Tail: TailText, MaxFDs: 1, Kind: KindDevice}},
	TypeTaskUffd: {name: "TaskUffd", request: Shape{Fixed: TaskUffd{}, MinFDs: 1, MaxFDs: 1, Kind: KindUffd}, reply: Shape{Fixed: Empty{}}},
	TypeObjectCreate: {name: "ObjectCreate", request: Shape{Fixed: ObjectCreate{}, Tail: TailStrings, MaxFDs: 1, Kind: KindFile},
		reply: Shape{Fixed: ObjectReply{}}},
	TypeAllocate: {name: "Allocate", request: Shape{Fixed: ObjectCreate{}, Tail: TailStrings, MaxFDs: 1, Kind: KindFile},
		reply: Shape{Fixed: ObjectReply{}}},
	TypeObjectOpen:         {name: "ObjectOpen", request: Shape{Fixed: ObjectOpen{}}, reply: Shape{Fixed: ObjectReply{}}},
	TypeObjectClose:        {name: "ObjectClose", request: Shape{Fixed: ObjectClose{}}, reply: Shape{Fixed: Empty{}}},
	TypeObjects:            {name: "Objects", request: Shape{Fixed: Objects{}}, reply: Shape{Fixed: ObjectsReply{}, Tail: TailList}},
	TypeObjectPages:        {name: "ObjectPages", request: Shape{Fixed: ObjectPages{}}, reply: Shape{Fixed: ObjectPagesReply{}, Tail: TailBytes}},
	TypeMap:                {name: "Map", request: Shape{Fixed: Map{}}, reply: Shape{Fixed: MapReply{}, MinFDs: 1, MaxFDs: 1, Kind: KindFile}},
	TypeMapReady:           {name: "MapReady", request: Shape{Fixed: MapReady{}}, reply: Shape{Fixed: Empty{}}},
	TypeUnmap:              {name: "Unmap", request: Shape{Fixed: Unmap{}}, reply: Shape{Fixed: Empty{}}},
	TypePopulate:           {name: "Populate", request: Shape{Fixed: Populate{}}, reply: Shape{Fixed: Empty{}}},
	TypePageOut:            {name: "PageOut", request: Shape{Fixed: PageOut{}}, reply: Shape{Fixed: Empty{}}},
	TypeFaultReason:        {name: "FaultReason", request: Shape{Fixed: FaultReason{}}, reply: Shape{Fixed: FaultReasonReply{}, Tail: TailText}},
	TypeRegionStats:        {name: "RegionStats", request: Shape{Fixed: RegionStats{}}, reply: Shape{Fixed: RegionStatsReply{}}},
	TypeSync:               {name: "Sync", request: Shape{Fixed: Sync{}}, reply: Shape{Fixed: Empty{}}},
	TypeAdvise:             {name: "Advise", request: Shape{Fixed: Advise{}}, reply: Shape{Fixed: Empty{}}},
	TypeWire:               {name: "Wire", request: Shape{Fixed: Wire{}}, reply: Shape{Fixed: Empty{}}},
	TypeUnwire:             {name: "Unwire", request: Shape{Fixed: Unwire{}}, reply: Shape{Fixed: Empty{}}},
	TypeDiscard:            {name: "Discard", request: Shape{Fixed: Discard{}}, reply: Shape{Fixed: Empty{}}},
	TypeObjectSetSize:      {name: "ObjectSetSize", request: Shape{Fixed: ObjectSetSize{}}, reply: Shape{Fixed: Empty{}}},
	TypeSetResident:        {name: "SetResident", request: Shape{Fixed: SetResident{}}, reply: Shape{Fixed: Empty{}}},
	TypeObjectSnapshot:     {name: "ObjectSnapshot", request: Shape{Fixed: ObjectSnapshot{}}, reply: Shape{Fixed: ObjectReply{}}},
	TypeObjectRight:        {name: "ObjectRight", request: Shape{Fixed: ObjectRight{}}, reply: Shape{Fixed: ObjectRightReply{}}},
	TypeObjectRevoke:       {name: "ObjectRevoke", request: Shape{Fixed: ObjectRevoke{}}, reply: Shape{Fixed: Empty{}}},
	TypeBackingStoreCreate: {name: "BackingStoreCreate", request: Shape{Fixed: BackingStoreCreate{}, Tail: TailText, MinFDs: 1, MaxFDs: 1, Kind: KindFile}, reply: Shape{Fixed: BackingStore{}}},
	TypeBackingStoreDelete: {name: "BackingStoreDelete", request: Shape{Fixed: BackingStore{}}, reply: Shape{Fixed: Empty{}}},
	TypeBackingStoreInfo:   {name: "BackingStoreInfo", request: Shape{Fixed: BackingStore{}}, reply: Shape{Fixed: BackingStoreInfoReply{}, Tail: TailText}},
	TypeInfo:               {name: "Info", request: Shape{Fixed: Empty{}}, reply: Shape{Fixed: InfoReply{}, Tail: TailStrings}},

	TypeUpgrade: {name: "Upgrade", request: Shape{Fixed: Empty{}}, reply: Shape{Fixed: Empty{}}},
	TypeDump:    {name: "Dump", request: Shape{Fixed: Empty{}}, reply: Shape{Fixed: Document{}, MinFDs: 1, MaxFDs: 1, Kind: KindFile}},
	TypeCheck:   {name: "Check", request: Shape{Fixed: Empty{}}, reply: Shape{Fixed: Document{}, MinFDs: 1, MaxFDs: 1, Kind: KindFile}},

	TypePut:    {name: "Put", request: Shape{Fixed: Put{}, Tail: TailBytes, MaxFDs: 1}, reply: Shape{Fixed: Empty{}}},
	TypeDrop:   {name: "Drop", request: Shape{Fixed: Drop{}}, reply: Shape{Fixed: Empty{}}},
	TypeReady:  {name: "Ready", request: Shape{Fixed: Empty{}}, reply: Shape{Fixed: Empty{}}},
	TypeResize: {name: "Resize", request: Shape{Fixed: Resize{}, MinFDs: 1, MaxFDs: 2}, reply: Shape{Fixed: Empty{}}},

	TypeStop:    {name: "Stop", request: Shape{Fixed: Empty{}}, reply: Shape{Fixed: Empty{}}},
	TypeGive:    {name: "Give", request: Shape{Fixed: Give{}, Tail: TailBytes, MaxFDs: 1}, reply: Shape{Fixed: Empty{}}},
	TypeReplace: {name: "Replace", request: Shape{Fixed: Empty{}}, reply: Shape{Fixed: Empty{}}},
	TypeOffer:   {name: "Offer", request: Shape{Fixed: Give{}, Tail: TailBytes}, reply: Shape{Fixed: Empty{}}},
	TypeGiven:   {name: "Given", request: Shape{Fixed: Given{}}, reply: Shape{Fixed: Empty{}}},

	TypeRestarted: {name: "Restarted", request: Shape{Fixed: Restarted{}}, reply: Shape{Fixed: Empty{}}},

	TypeCancel: {name: "Cancel", request: Shape{Fixed: Cancel{}}, oneWay: true},
}

func (t Type) String() string {
	if s, ok := specs[t]; ok {
		return s.name
	}
	return fmt.Sprintf("type %d", uint16(t))
}

// check holds a received body and its number of fds against the shape. The kinds of the fds are checked apart.
func (s Shape) check(t Type, body []byte, fds int) error {
	fixed := binary.Size(s.Fixed)
	switch {
	case len(body) < fixed || s.Tail == TailNone && len(body) != fixed:
		return fmt.Errorf("%v with %d bytes of body, want %d: %w", t, len(body), fixed, ErrMalformed)
	case fds < s.MinFDs || fds > s.MaxFDs:
		return fmt.Errorf("%v with %d file descriptors, want %d to %d: %w", t, fds, s.MinFDs, s.MaxFDs, ErrMalformed)
	}
	return nil
}
