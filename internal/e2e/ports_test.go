package e2e

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

func init() { tasks["ports"] = portsTask }

// lockedBuffer takes a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

type portsResult struct {
	Ports []emm.Port
	Said  string // the whole log, and every error there was
}

// portsTask does with ports all that can be done, right and wrong, at a pager that logs whatever it has to say.
func portsTask(c *conn) error {
	var log lockedBuffer
	ctx := context.Background()
	p, err := spawn.Start(ctx, &spawn.Options{Resident: 1 << 20, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		return err
	}
	var res portsResult
	said := func(err error) {
		if err != nil {
			fmt.Fprintf(&log, "%v\n%+v\n%#v\n", err, err, err)
		}
	}
	for range 10 {
		o, err := p.ObjectCreate(ctx, 4<<20, nil)
		if err != nil {
			return err
		}
		port := o.Port()
		res.Ports = append(res.Ports, port)
		again, err := p.ObjectOpen(ctx, port)
		if err != nil {
			return err
		}
		r, err := again.Map(ctx, nil)
		if err != nil {
			return err
		}
		for i := range 1024 {
			r.Bytes()[i*4096] = 1
		}
		s, err := again.Snapshot(ctx)
		if err != nil {
			return err
		}
		res.Ports = append(res.Ports, s.Port())
		fmt.Fprintf(&log, "%v %+v %v %v\n", o, again, r.Stats(), s)
		_, err = o.Map(ctx, &region.MapOptions{Offset: 1 << 40, Size: 4096})
		said(err)
		said(o.SetSize(ctx, -1))
		said(r.Close())
		said(o.Close())
		said(again.Close())
		said(s.Close())
		for _, gone := range []emm.Port{port, emm.NewPort()} {
			res.Ports = append(res.Ports, gone)
			_, err = p.ObjectOpen(ctx, gone)
			if !errors.Is(err, emm.InvalidArgument) {
				return fmt.Errorf("open a port that is gone: %w", err)
			}
			said(err)
		}
	}
	if err := p.Close(); err != nil {
		return err
	}
	log.mu.Lock()
	defer log.mu.Unlock()
	res.Said = log.b.String()
	return c.send(res)
}

// TestPortsNotLogged: no port is in the log of a busy pager, at any level, nor in an error.
func TestPortsNotLogged(t *testing.T) {
	var res portsResult
	run(t, "ports", nil, &res, nil)
	if len(res.Ports) < 40 || !strings.Contains(res.Said, "task connected") || !strings.Contains(res.Said, "no object has this port") {
		t.Fatalf("%d ports, and the log is\n%s", len(res.Ports), res.Said)
	}
	low := strings.ToLower(res.Said)
	for _, p := range res.Ports {
		half := hex.EncodeToString(p[:8])
		bytes := strings.Trim(fmt.Sprint(p[:8]), "[]")
		for _, secret := range []string{half, bytes, strings.ReplaceAll(bytes, " ", ","), fmt.Sprintf("%q", p[:8])} {
			if strings.Contains(low, strings.ToLower(secret)) {
				t.Errorf("a port was told: %q in\n%s", secret, res.Said)
			}
		}
	}
}
