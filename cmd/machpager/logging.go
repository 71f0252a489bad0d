//go:build linux

package main

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// logFlags adds --log-level and --log-format.
func logFlags(c *cobra.Command, level *slog.Level, asJSON *bool) {
	*level = slog.LevelInfo
	c.Flags().Var(levelFlag{level}, "log-level", "what to log, and all that is graver: debug, info, warn or error")
	c.Flags().Var(formatFlag{asJSON}, "log-format", "how to log, on standard error: text (logfmt) or json")
}

// levelFlag is a flag with a level of slog.
type levelFlag struct{ level *slog.Level }

var levelNames = []string{"debug", "info", "warn", "error"}

func (f levelFlag) String() string {
	if f.level == nil {
		return ""
	}
	return strings.ToLower(f.level.String())
}

func (f levelFlag) Type() string { return "level" }

func (f levelFlag) Set(text string) error {
	if !slices.Contains(levelNames, strings.ToLower(text)) {
		return fmt.Errorf("want debug, info, warn or error")
	}
	return f.level.UnmarshalText([]byte(text))
}

// formatFlag is a flag that chooses between text and JSON.
type formatFlag struct{ json *bool }

func (f formatFlag) String() string {
	if f.json != nil && *f.json {
		return "json"
	}
	return "text"
}

func (f formatFlag) Type() string { return "format" }

func (f formatFlag) Set(text string) error {
	switch text {
	case "text":
		*f.json = false
	case "json":
		*f.json = true
	default:
		return fmt.Errorf("want text or json")
	}
	return nil
}
