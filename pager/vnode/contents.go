package vnode

import (
	"errors"
	"fmt"
	"io"
)

// readWriter is contents behind the interfaces of package io.
type readWriter struct {
	r     io.ReaderAt
	w     io.WriterAt  // nil: read-only
	flush func() error // nil: nothing to do
	size  int64
}

func (c *readWriter) limit() int64 { return max(0, c.size) }

func (c *readWriter) read(p []byte, off int64) (int, error) {
	p = p[:min(int64(len(p)), c.size-off)]
	n, err := c.r.ReadAt(p, off)
	switch {
	case n < 0 || n > len(p):
		return 0, fmt.Errorf("read %d bytes at %d: ReadAt says %d", len(p), off, n)
	case n == len(p) && (err == nil || errors.Is(err, io.EOF)):
		return n, nil
	case err == nil || errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	case n == len(p):
		n = 0 // whatever it means
	}
	return n, fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
}

func (c *readWriter) write(p []byte, off int64) error {
	n, err := c.w.WriteAt(p, off)
	if err == nil && n != len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

func (c *readWriter) sync() error {
	if c.flush == nil {
		return nil
	}
	return c.flush()
}

func (c *readWriter) close() error {
	if k, ok := c.r.(io.Closer); ok {
		return k.Close()
	}
	return nil
}
