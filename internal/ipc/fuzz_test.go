package ipc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
)

// Every row of the table has structs that encoding/binary knows, and a place in PROTOCOL.md.
func TestTable(t *testing.T) {
	doc, err := os.ReadFile("PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	for typ, s := range specs {
		for _, shape := range []Shape{s.request, s.reply} {
			if s.oneWay && shape.Fixed == nil {
				continue
			}
			n := binary.Size(shape.Fixed)
			if n < 0 || n%4 != 0 || n != int(reflect.TypeOf(shape.Fixed).Size()) {
				t.Errorf("%v: %T has %d bytes on the wire, %d in memory", typ, shape.Fixed, n, reflect.TypeOf(shape.Fixed).Size())
			}
			if shape.MaxFDs > MaxFDs || shape.MinFDs > shape.MaxFDs || n+statusSize > MaxBody {
				t.Errorf("%v: %+v is beyond the limits", typ, shape)
			}
		}
		if row := "| " + s.name + " |"; !strings.Contains(string(doc), row) {
			t.Errorf("%v is not in PROTOCOL.md", typ)
		}
	}
}

func FuzzHeader(f *testing.F) {
	f.Add(Header{Version: Version, Type: TypeInfo, Seq: 1}.append(nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrVersion) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(h.append(nil), b[:HeaderSize]) || int(h.Length) != len(b)-HeaderSize {
			t.Fatalf("%+v is not % x", h, b)
		}
	})
}

// FuzzBodies checks a body against every type's shape and decodes what fits. What was decoded must encode to the same bytes.
func FuzzBodies(f *testing.F) {
	for typ, s := range specs {
		b, err := AppendFixed(nil, s.request.Fixed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint16(typ), false, uint8(s.request.MinFDs), b)
		if b, err = AppendFixed(nil, Status{}); err != nil {
			f.Fatal(err)
		}
		f.Add(uint16(typ), true, uint8(0), b)
	}
	f.Add(uint16(TypeInfo), true, uint8(0), []byte("\x01\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00no"))
	f.Fuzz(func(t *testing.T, typ uint16, reply bool, fds uint8, body []byte) {
		s := specs[Type(typ)]
		shape := s.request
		if reply {
			rest, err := parseReply(Type(typ), body)
			var remote *RemoteError
			if errors.As(err, &remote) {
				_ = remote.Error()
				for _, e := range remote.Unwrap() {
					_ = e.Error()
				}
				return
			}
			if err != nil {
				if !errors.Is(err, ErrMalformed) {
					t.Fatal(err)
				}
				return
			}
			shape, body = s.reply, rest
		}
		if shape.Fixed == nil || shape.check(Type(typ), body, int(fds)) != nil {
			return
		}
		v := reflect.New(reflect.TypeOf(shape.Fixed))
		n, err := binary.Decode(body, binary.LittleEndian, v.Interface())
		if err != nil {
			t.Fatalf("%v passed the check, and %v", Type(typ), err)
		}
		back, err := AppendFixed(nil, v.Elem().Interface())
		if err != nil || !bytes.Equal(back, body[:n]) {
			t.Fatalf("%v: % x decodes and encodes to % x, %v", Type(typ), body[:n], back, err)
		}
	})
}

func FuzzStrings(f *testing.F) {
	good, err := AppendStrings(nil, "manager", "", "argument")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, uint8(3))
	f.Add([]byte{0xff, 0xff}, uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, n uint8) {
		s, err := DecodeStrings(b, int(n))
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		back, err := AppendStrings(nil, s...)
		if len(s) != int(n) || len(b) <= MaxBody && (err != nil || !bytes.Equal(back, b)) {
			t.Fatalf("% x gives %q gives % x, %v", b, s, back, err)
		}
	})
}

func FuzzList(f *testing.F) {
	good, err := AppendList(nil, []ObjectEntry{{ID: 1}, {ID: 2, Size: -1}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[1:])
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := DecodeList[ObjectEntry](b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		if back, err := AppendList(nil, list); err != nil || !bytes.Equal(back, b) {
			t.Fatalf("% x gives % x, %v", b, back, err)
		}
	})
}

// FuzzConn sends arbitrary packets with arbitrary numbers of fds to a serving Link: an answer or an end, never a panic or a leak.
func FuzzConn(f *testing.F) {
	f.Add([]byte("x"), uint8(0))
	f.Add(Header{Version: Version, Type: TypePut, Seq: 1, Length: 40, FDs: 1}.append(nil), uint8(1))
	for typ, s := range specs {
		b, err := AppendFixed(nil, s.request.Fixed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(frame(Header{Version: Version, Type: typ, Seq: 1, Length: uint32(len(b)), FDs: uint16(s.request.MinFDs)}, b), uint8(s.request.MinFDs))
	}
	f.Fuzz(func(t *testing.T, b []byte, fds uint8) {
		if len(b) == 0 || len(b) > 100000 {
			return
		}
		before := openFDs(t)
		a, file, err := Pair()
		if err != nil {
			t.Fatal(err)
		}
		l := NewLink(a, &LinkOptions{Handler: echo})
		list := make([]int, min(fds, 253)) // the kernel sends no more
		for i := range list {
			list[i] = int(file.Fd())
		}
		raw(t, int(file.Fd()), b, list...)
		file.Close()
		<-l.Done()
		l.Close()
		if after := openFDs(t); after > before {
			t.Fatalf("%d fds open, %d before", after, before)
		}
	})
}
