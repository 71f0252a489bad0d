# machpager: what can be made here.
#
#	make          bin/machpager
#	make demo     two processes share memory through a pager, and both compute the same hash; a sort of eight times what may be resident
#	make test     everything that must hold: format, vet, staticcheck, all tests
#	make bench    the fault benchmark against a C floor compiled on the spot (needs gcc)
#	make fuzz     every fuzz target for FUZZTIME
#	make soak     the randomised end-to-end tests for SOAK each, with kills of the pager at random instants and at every failpoint
#	make systemd-test
#	              the units of contrib/systemd under a real systemd that is booted in a container (needs root and systemd-container)
#	make deps     the Debian packages that test and bench need; the pager itself needs none

GO       ?= go
GOTEST   ?= $(GO) test
TIMEOUT  ?= 900s
FUZZTIME ?= 10s
SOAK     ?= 60s

# The core is pure Go. Only the race detector and parts of bench need C.
export CGO_ENABLED = 0

# The race detector sees races of the pager's own memory. It cannot see those in region memory, which is not Go's.
RACE := $(shell command -v gcc >/dev/null && echo -race)

# A process under the race detector sleeps for a second before it ends, unless told otherwise; the tests start thousands, which wait for each other.
export GORACE := $(GORACE) atexit_sleep_ms=0

# The packages whose tests need real faults in several processes: run once more on one P, where a handler that needed the faulting
# process's help would stand still at once.
INTEGRATION = ./region/... ./internal/e2e/...

.PHONY: all build demo test lint fmt unit integration bench fuzz soak systemd-test deps clean

all: build

build:
	$(GO) build -trimpath -o bin/machpager ./cmd/machpager

demo: build
	bin/machpager demo share
	@echo
	bin/machpager demo sort --size 256M --resident 32M

test: lint unit integration

lint: fmt
	$(GO) build ./...
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

fmt:
	@bad=$$(gofmt -l .); if [ -n "$$bad" ]; then echo "gofmt -w these files:"; echo "$$bad"; exit 1; fi

# -timeout ends a test that hangs, with the stacks of all its goroutines. The end-to-end tests run without the race detector: they are many processes
# with bounds in seconds, which it slows ten times; what they exercise runs under it in the tests of each package. Those that run side by side mostly
# wait: -parallel has nothing to do with the number of processors.
unit:
	CGO_ENABLED=$(if $(RACE),1,0) $(GOTEST) $(RACE) -timeout $(TIMEOUT) $$($(GO) list ./... | grep -v /internal/e2e)
	$(GOTEST) -parallel 4 -timeout $(TIMEOUT) ./internal/e2e

integration:
	GOMAXPROCS=1 $(GOTEST) -count=1 -parallel 4 -timeout $(TIMEOUT) $(INTEGRATION)

bench:
	# With cgo, so that userfaultfd-go has its row.
	CGO_ENABLED=1 $(GO) build -trimpath -o bin/machpager-bench ./cmd/machpager
	bin/machpager-bench bench fault

fuzz:
	@set -e; for pkg in $$($(GO) list ./...); do \
		targets=$$($(GO) test -list '^Fuzz' $$pkg); \
		for target in $$(echo "$$targets" | grep '^Fuzz' || true); do \
			echo "$$pkg $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done

soak:
	MACHPAGER_SOAK=$(SOAK) $(GO) test -count=1 -v -timeout 30m -run 'Metamorphic|Hazard|FillEmptyFill|PagingFiles|PagingSpaceFull|Killed' ./internal/e2e
	MACHPAGER_SOAK=$(SOAK) $(GO) test -count=1 -v -run TestModel ./pager/checked

systemd-test:
	contrib/systemd/test/run

deps:
	apt-get install -y --no-install-recommends gcc libc6-dev

clean:
	rm -rf bin
