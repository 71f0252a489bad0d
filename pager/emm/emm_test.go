package emm

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestPort(t *testing.T) {
	p, q := NewPort(), NewPort()
	if p == q || p.IsNull() || !p.Equal(p) || p.Equal(q) || !(Port{}).IsNull() {
		t.Error("ports are not distinct")
	}
	if r, err := ParsePort(p.String()); err != nil || r != p {
		t.Errorf("parse %s: %v, %v", p, r, err)
	}
	for _, s := range []string{"", "00", p.String() + "00", p.String()[1:], "g" + p.String()[1:], p.String()[:31] + " "} {
		if _, err := ParsePort(s); !errors.Is(err, InvalidArgument) {
			t.Errorf("parse %q: %v", s, err)
		}
	}
}

func TestKernReturn(t *testing.T) {
	for _, k := range []KernReturn{Success, MIGNoReply} {
		if k.Err() != nil {
			t.Errorf("%v is an error", k)
		}
	}
	for k := range kernReturnText {
		if k == Success || k == MIGNoReply {
			continue
		}
		err := fmt.Errorf("touch page: %w", k.Err())
		if !errors.Is(err, k) || errors.Is(err, Success) {
			t.Errorf("%v: errors.Is fails", k)
		}
		var got KernReturn
		if !errors.As(err, &got) || got != k {
			t.Errorf("%v: errors.As gives %v", k, got)
		}
	}
	if s := KernReturn(99).Error(); s != "kern_return_t 99" {
		t.Errorf("unknown value: %q", s)
	}
	if MemoryError.String() != "KERN_MEMORY_ERROR" || int32(MemoryError) != 10 || int32(MIGNoReply) != -305 {
		t.Error("not Mach's values")
	}
}

func TestRunEnd(t *testing.T) {
	if (Run{Off: 8192, Size: 4096}).End() != 12288 {
		t.Error("Run.End")
	}
}

// TestPortNotShown: only who asks for the digits gets them.
func TestPortNotShown(t *testing.T) {
	p := NewPort()
	text := p.String()
	if got := fmt.Sprintf("%s %x %q", p, p, p); got != text+" "+text+` "`+text+`"` {
		t.Errorf("asked for: %s", got)
	}
	var b bytes.Buffer
	inside := struct {
		Head
		P    Port
		List []Port
		Map  map[Port]*Port
	}{Head{Object: p}, p, []Port{p}, map[Port]*Port{p: &p}}
	fmt.Fprintf(&b, "%v %+v %#v %v %d ", p, p, p, &p, p)
	fmt.Fprintf(&b, "%v %+v %#v ", inside, inside, inside)
	fmt.Fprintln(&b, p, inside)
	for _, h := range []slog.Handler{slog.NewTextHandler(&b, nil), slog.NewJSONHandler(&b, nil)} {
		slog.New(h).Info("of a port", "port", p, "pointer", &p)
		slog.New(h).With("port", p).WithGroup("g").Info("again", slog.Group("in", "port", p))
	}
	slog.New(slog.NewTextHandler(&b, nil)).Info("struct", "s", inside)
	numbers := strings.Trim(fmt.Sprint(p[:]), "[]") // as bytes
	for _, secret := range []string{text, strings.ToUpper(text), numbers, strings.ReplaceAll(numbers, " ", ", "), strings.ReplaceAll(numbers, " ", ",")} {
		if strings.Contains(b.String(), secret) {
			t.Errorf("%q is in %s", secret, &b)
		}
	}
	if n := strings.Count(b.String(), redacted); n < 10 {
		t.Errorf("that there are ports is said %d times: %s", n, &b)
	}
}
