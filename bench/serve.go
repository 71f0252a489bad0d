//go:build linux

package bench

import (
	"bufio"
	"encoding/json"
	"io"
	"os"
)

// jobLines are the lines that the driver sends. The process ends with them: the driver is gone then, and a thread in a fault goes down with the process.
func jobLines() <-chan []byte {
	lines := make(chan []byte)
	go func() {
		in := bufio.NewReader(os.Stdin)
		for {
			line, err := in.ReadBytes('\n')
			if err != nil {
				os.Exit(0)
			}
			lines <- line
		}
	}()
	return lines
}

// serveJobs says that the client is ready, by an empty answer, and answers each job, a line of JSON each.
func serveJobs[Job, Result any](lines <-chan []byte, do func(Job) Result) error {
	out := json.NewEncoder(os.Stdout)
	var ready Result
	if err := out.Encode(ready); err != nil {
		return err
	}
	for line := range lines {
		var j Job
		if err := json.Unmarshal(line, &j); err != nil {
			return err
		}
		if err := out.Encode(do(j)); err != nil {
			return err
		}
	}
	return io.ErrUnexpectedEOF
}
