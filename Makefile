# quire's build and tests. `make` alone lists the targets.
#
# What a target needs it builds first; programs of others (etcd, kine,
# kube-apiserver, staticcheck, benchstat) come from the nested modules under
# test/peers, which pin their versions, and are built again only when those
# pins change. They are built with the flags that `go test` uses, so that the
# tests find the packages they share with them already compiled.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT  ?= $(shell git rev-parse --short=9 HEAD 2>/dev/null || echo unknown)
# SQLite and its C runtime are translated C, full of pointers that Go's rules do not cover. The race detector
# finds nothing of ours there and makes every statement ten times slower.
RACE := -race -gcflags=modernc.org/sqlite/lib=-race=false -gcflags=modernc.org/libc=-race=false
# A race binary sleeps for a second before it exits, else: many tests stop many of them.
export GORACE ?= atexit_sleep_ms=0
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.gitSHA=$(COMMIT)

BIN   := $(CURDIR)/bin
PEERS := bin/peers
# Modules of their own, so that what they need stays out of quire's go.mod.
TEST_MODULES := test/etcd test/load test/k8s
ALL_MODULES  := . $(TEST_MODULES) test/peers/etcd test/peers/kine test/peers/kubernetes test/peers/tools

PKG  ?= ./...
# of differential and crash, unless the target below says otherwise
N    ?=
SEED ?=
FUZZTIME ?= 10s
BENCH    ?= .
BASE     ?= HEAD
COUNT    ?= 10

KUBERNETES_VERSION := v1.36.3
KUBERNETES_LDFLAGS := -s -w \
	-X k8s.io/component-base/version.gitVersion=$(KUBERNETES_VERSION) \
	-X k8s.io/component-base/version.gitMajor=1 \
	-X k8s.io/component-base/version.gitMinor=36 \
	-X k8s.io/component-base/version.gitTreeState=clean

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

## Building

.PHONY: build
build: ## build the static binary bin/quire
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/quire ./cmd/quire

.PHONY: build-race
build-race: need-gcc
	CGO_ENABLED=1 $(GO) build $(RACE) -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/quire-race ./cmd/quire

.PHONY: run
run: ## run quire on 127.0.0.1:2379 (ARGS='--flag …')
	$(GO) run ./cmd/quire $(ARGS)

.PHONY: peers
peers: $(PEERS)/etcd $(PEERS)/etcdctl $(PEERS)/etcdutl $(PEERS)/kine $(PEERS)/kube-apiserver ## build etcd, etcdctl, etcdutl, kine and kube-apiserver into bin/peers

ETCD_PINS := test/peers/etcd/go.mod test/peers/etcd/go.sum
$(PEERS)/etcd: $(ETCD_PINS)
	cd test/peers/etcd && $(GO) build -o $(abspath $@) go.etcd.io/etcd/server/v3
$(PEERS)/etcdctl: $(ETCD_PINS)
	cd test/peers/etcd && $(GO) build -o $(abspath $@) go.etcd.io/etcd/etcdctl/v3
$(PEERS)/etcdutl: $(ETCD_PINS)
	cd test/peers/etcd && $(GO) build -o $(abspath $@) go.etcd.io/etcd/etcdutl/v3
# etcd's own tests, as programs.
$(PEERS)/etcd-%.test: $(ETCD_PINS)
	cd test/peers/etcd && $(GO) test -c -tags e2e -o $(abspath $@) go.etcd.io/etcd/tests/v3/$*

# cgo is kine's own default for SQLite.
$(PEERS)/kine: test/peers/kine/go.mod test/peers/kine/go.sum | need-gcc
	cd test/peers/kine && CGO_ENABLED=1 $(GO) build -o $(abspath $@) github.com/k3s-io/kine

$(PEERS)/kube-apiserver: test/peers/kubernetes/go.mod test/peers/kubernetes/go.sum test/peers/kubernetes/kube-apiserver/main.go
	cd test/peers/kubernetes && $(GO) build -ldflags '$(KUBERNETES_LDFLAGS)' -o $(abspath $@) ./kube-apiserver

TOOLS_PINS := test/peers/tools/go.mod test/peers/tools/go.sum
$(PEERS)/staticcheck: $(TOOLS_PINS)
	cd test/peers/tools && $(GO) build -o $(abspath $@) honnef.co/go/tools/cmd/staticcheck
$(PEERS)/benchstat: $(TOOLS_PINS)
	cd test/peers/tools && $(GO) build -o $(abspath $@) golang.org/x/perf/cmd/benchstat

# The race detector and kine need a C compiler.
.PHONY: need-gcc
need-gcc:
	@command -v gcc >/dev/null && test -e /usr/include/stdlib.h || { \
		echo 'installing gcc, which is missing here'; \
		apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev; }

# Some tests read the live database as a person would.
.PHONY: need-sqlite3
need-sqlite3:
	@command -v sqlite3 >/dev/null || { \
		echo 'installing the sqlite3 shell, which is missing here'; \
		apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends sqlite3; }

# The Postgres tests start servers of their own, and poolers: neither the cluster that Debian's package would make nor
# its pgbouncer service is to run.
.PHONY: need-postgres
need-postgres:
	@newest=$$(for program in /usr/lib/postgresql/*/bin/postgres /usr/pgsql-*/bin/postgres $$(command -v postgres || true); do \
			test ! -x $$program || $$program --version; \
		done | sed -E 's/^postgres \(PostgreSQL\) ([0-9]+).*/\1/' | sort -n | tail -n 1); \
	test "$${newest:-0}" -ge 15 || { \
		echo 'installing PostgreSQL, which is missing here'; \
		apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql-common && \
		sed -Ei 's/^#?create_main_cluster *=.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql; }
	@command -v pgbouncer >/dev/null || test -x /usr/sbin/pgbouncer || { \
		echo 'installing pgbouncer, which is missing here'; \
		apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends pgbouncer && \
		{ test ! -d /run/systemd/system || systemctl disable --now pgbouncer; }; }

## Testing

.PHONY: test
test: build build-race $(PEERS)/etcd $(PEERS)/etcdutl need-sqlite3 need-postgres ## vet, unit and black-box tests with the race detector (< 10 min)
	$(GO) vet ./...
	CGO_ENABLED=1 $(GO) test $(RACE) -timeout 8m ./...
	for module in $(TEST_MODULES); do (cd $$module && $(GO) vet ./...); done
	cd test/etcd && packages=$$($(GO) list ./... | sed -E '/\/(outages|cluster|partitions|powercut)$$/d') && QUIRE_BIN=$(BIN)/quire-race $(GO) test -count=1 -timeout 8m $$packages
	cd test/load && packages=$$($(GO) list ./... | sed '/\/crash$$/d') && $(GO) test $$packages
	cd test/load && QUIRE_BIN=$(BIN)/quire-race $(GO) test -count=1 -timeout 8m ./crash -args -cycles=10

.PHONY: race
race: need-gcc ## unit tests with the race detector, never from the cache (PKG=./backend)
	CGO_ENABLED=1 $(GO) test $(RACE) -count=1 -timeout 15m $(PKG)

.PHONY: conformance
conformance: build $(PEERS)/etcdutl ## the conformance suite against etcd and bin/quire
	cd test/etcd && QUIRE_BIN=$(BIN)/quire $(GO) test -count=1 -timeout 15m ./conformance/...

.PHONY: differential
differential: build ## random operations on etcd and quire side by side (N=100000 SEED=…)
	cd test/etcd && QUIRE_BIN=$(BIN)/quire $(GO) test -count=1 -timeout 0 -v ./differential -args -n=$(or $(N),100000) $(if $(SEED),-seed=$(SEED))

.PHONY: test-postgres
test-postgres: build build-race $(PEERS)/etcdutl $(PEERS)/kube-apiserver need-postgres ## the suites on PostgreSQL, with one process and with several (N=30000 differential operations each, SEED=…)
	CGO_ENABLED=1 $(GO) test $(RACE) -count=1 -timeout 10m -run Postgres ./backend
	cd test/etcd && QUIRE_STORAGE=postgres QUIRE_BIN=$(BIN)/quire-race $(GO) test -count=1 -timeout 15m -skip '^TestEtcd$$' ./start ./conformance/...
	cd test/etcd && QUIRE_BIN=$(BIN)/quire $(GO) test -count=1 -timeout 15m ./outages
	for processes in 1 3; do \
		(cd test/etcd && QUIRE_STORAGE=postgres QUIRE_BIN=$(BIN)/quire $(GO) test -count=1 -timeout 0 -v ./differential \
			-args -processes=$$processes -n=$(or $(N),30000) $(if $(SEED),-seed=$(SEED))); \
	done
	cd test/k8s && QUIRE_STORAGE=postgres QUIRE_TEST_SERVER=$(BIN)/quire $(GO) test -count=1 -parallel 12 -timeout 10m -v .

.PHONY: test-raft
test-raft: build build-race $(PEERS)/etcd $(PEERS)/etcdctl $(PEERS)/etcdutl ## clusters of three: simulation, suites, etcd beside, power cuts, partitions (N=30000 differential operations, SEED=…)
	$(MAKE) simulate N=10000
	@# Leases do not age while a cluster has no leader, and a Raft log wants more room than the small disk of a test has.
	cd test/etcd && QUIRE_STORAGE=sqlraft QUIRE_BIN=$(BIN)/quire-race $(GO) test -count=1 -timeout 15m \
		-skip '^(TestEtcd|TestLeaseDeadlinesSurviveARestart|TestAFullDiskIsSurvived)$$' ./conformance/...
	for processes in 1 3; do \
		(cd test/etcd && QUIRE_STORAGE=sqlraft QUIRE_BIN=$(BIN)/quire $(GO) test -count=1 -timeout 0 -v ./differential \
			-args -processes=$$processes -n=$(or $(N),30000) $(if $(SEED),-seed=$(SEED))); \
	done
	cd test/etcd && QUIRE_BIN=$(BIN)/quire $(GO) test -count=1 -timeout 15m ./cluster
	cd test/load && QUIRE_STORAGE=sqlraft QUIRE_BIN=$(BIN)/quire-race $(GO) test -count=1 -timeout 8m ./crash -args -cycles=20
	$(MAKE) powercut N=15
	cd test/etcd && QUIRE_BIN=$(BIN)/quire $(GO) test -count=1 -timeout 15m ./partitions

.PHONY: test-etcd-suite
test-etcd-suite: build etcd-suite ## etcd's own tests with quire in its place (QUIRE_STORAGE=sqlite|postgres, QUIRE_BIN=bin/peers/etcd, ARGS='-run TestLock')
	$(if $(filter postgres,$(QUIRE_STORAGE)),$(MAKE) need-postgres)
	$(ETCD_SUITE) -server $(abspath $(or $(QUIRE_BIN),bin/quire)) $(ARGS)

# -slice is the time that the cases took etcd when they were listed.
.PHONY: test-etcd-slice
test-etcd-slice: ## a choice of test-etcd-suite, on each storage (< 10 min)
	$(MAKE) test-etcd-suite ARGS='-slice 4m'
	$(MAKE) test-etcd-suite QUIRE_STORAGE=sqlite ARGS='-slice 1m'
	$(MAKE) test-etcd-suite QUIRE_STORAGE=postgres ARGS='-slice 1m'

# Once etcd's version changes: which cases there are, and how long they take.
.PHONY: etcd-suite-cases
etcd-suite-cases: etcd-suite $(PEERS)/etcd
	$(ETCD_SUITE) -server $(abspath $(PEERS)/etcd) -calibrate test/etcd/suite/cases.txt
	$(MAKE) etcd-suite-doc

.PHONY: etcd-suite-doc
etcd-suite-doc: ## docs/etcd-suite.md from the lists of cases
	cd test/etcd && $(GO) run ./suite -document $(CURDIR)/docs/etcd-suite.md

ETCD_SUITE = $(BIN)/suite -peers $(abspath $(PEERS)) -logs $(BIN)/etcd-suite \
	-fixtures $$(cd test/peers/etcd && $(GO) list -m -f '{{.Dir}}' go.etcd.io/etcd/tests/v3)/fixtures
.PHONY: etcd-suite
etcd-suite: $(PEERS)/etcdctl $(PEERS)/etcdutl $(PEERS)/etcd-common.test $(PEERS)/etcd-e2e.test
	cd test/etcd && $(GO) build -o $(BIN)/suite ./suite

.PHONY: powercut
powercut: build need-sqlite3 ## disks that forget what was not synced, that fail and that fill up, below one process and three (N=15 cuts a test, SEED=…)
	cd test/etcd && $(if $(N),QUIRE_CUTS=$(N)) $(if $(SEED),QUIRE_SEED=$(SEED)) QUIRE_BIN=$(BIN)/quire $(GO) test -count=1 -timeout 0 ./powercut

.PHONY: simulate
simulate: ## simulated clusters: histories with faults from one seed each (N=10000, SEED=…)
	QUIRE_SIMULATE=$(or $(N),10000) $(if $(SEED),QUIRE_SEED=$(SEED)) $(GO) test -count=1 -timeout 0 -run '^TestSimulation$$' -v ./sqlraft

.PHONY: crash
crash: build ## kill -9 under load, then look what is left (N=500 cycles, SEED=…)
	cd test/load && QUIRE_BIN=$(BIN)/quire $(GO) test -count=1 -timeout 0 -v ./crash -args -cycles=$(or $(N),500) $(if $(SEED),-seed=$(SEED))

.PHONY: test-k8s
test-k8s: build $(PEERS)/kube-apiserver ## a real kube-apiserver on quire, driven by client-go (QUIRE_TEST_SERVER=bin/peers/etcd tries it on etcd)
	cd test/k8s && QUIRE_TEST_SERVER=$(abspath $(or $(QUIRE_TEST_SERVER),bin/quire)) $(GO) test -count=1 -parallel 12 -timeout 10m -v -run '^TestKubernetes$$' .

.PHONY: fuzz
fuzz: ## every fuzz test for a short time (FUZZTIME=10s)
	packages=$$($(GO) list ./...); \
	for package in $$packages; do \
		fuzzes=$$($(GO) test -list '^Fuzz' $$package | sed -n '/^Fuzz/p'); \
		for fuzz in $$fuzzes; do \
			$(GO) test -run '^$$' -fuzz "^$$fuzz\$$" -fuzztime $(FUZZTIME) $$package; \
		done; \
	done

# Each step is a make of its own, so that none starts before the one above has
# passed; the slowest come last.
.PHONY: test-all
test-all: ## everything: lint, verify, test, fuzz, long differential and crash runs, a short bench, kube-apiserver (< 90 min)
	$(MAKE) lint
	$(MAKE) verify
	$(MAKE) test
	$(MAKE) test-postgres
	$(MAKE) test-raft
	$(MAKE) fuzz
	$(MAKE) differential N=500000
	$(MAKE) crash N=200
	$(MAKE) bench-quick
	$(MAKE) test-k8s
	$(MAKE) test-etcd-slice

## House keeping

.PHONY: lint
lint: $(PEERS)/staticcheck ## gofmt, go vet and staticcheck over all modules
	$(MAKE) fmt-check
	for module in . $(TEST_MODULES); do echo "lint $$module"; (cd $$module && $(GO) vet ./... && $(abspath $(PEERS)/staticcheck) ./...); done
	cd test/peers/kubernetes && $(GO) vet ./...

.PHONY: fmt-check
fmt-check:
	@files=$$(find . -name '*.go' -not -path './bin/*' -not -path './.git/*' -print0 | xargs -0 gofmt -l); \
	if [ -n "$$files" ]; then echo 'gofmt -w has to run over:'; echo "$$files"; exit 1; fi

.PHONY: verify
verify: ## go.mod and go.sum of every module are tidy and whole, sources formatted
	$(MAKE) fmt-check
	for module in $(ALL_MODULES); do echo "verify $$module"; (cd $$module && $(GO) mod tidy -diff && $(GO) mod verify >/dev/null); done

.PHONY: bench
bench: build $(PEERS)/etcd $(PEERS)/kine ## quire, etcd and kine side by side; writes docs/performance.md (ARGS='-only …')
	cd test/load && $(GO) build -o $(BIN)/floor ./floor && $(GO) run ./bench $(ARGS)

.PHONY: bench-quick
bench-quick: build $(PEERS)/etcd $(PEERS)/kine
	cd test/load && $(GO) run ./bench -quick

.PHONY: bench-scale
bench-scale: build $(PEERS)/etcd ## 1M keys with 3M revisions, then 20 GiB; writes docs/performance.md too (ARGS='-scale 20g')
	cd test/load && $(GO) run ./bench -scale 1m,20g -seconds 10s $(ARGS)

.PHONY: bench-postgres
bench-postgres: build $(PEERS)/etcd $(PEERS)/kine need-postgres ## one and three quires, and kine, on PostgreSQL, and etcd; writes docs/performance.md too (ARGS=-bloat: an hour of updates)
	cd test/load && $(GO) run ./bench -postgres $(ARGS)

.PHONY: bench-raft
bench-raft: build $(PEERS)/etcd ## three members of quire against three of etcd; writes docs/performance.md too
	cd test/load && $(GO) run ./bench -raft $(ARGS)

.PHONY: profile
profile: build ## where quire's CPU, allocations and waits go; writes docs/performance.md too (ARGS='-seconds 30s')
	cd test/load && $(GO) run ./bench -profile -servers quire -seconds 10s $(ARGS)

.PHONY: bench-compare
bench-compare: $(PEERS)/benchstat ## Go benchmarks of the work tree against BASE=HEAD, ten runs each (BENCH=. PKG=./...)
	rm -rf $(BIN)/base && git worktree prune
	git worktree add --detach $(BIN)/base $(BASE)
	trap 'git worktree remove --force $(BIN)/base' EXIT; \
	: > $(BIN)/base.txt; : > $(BIN)/head.txt; \
	for i in $$(seq $(COUNT)); do \
		(cd $(BIN)/base && $(GO) test -run '^$$' -bench '$(BENCH)' $(PKG)) >> $(BIN)/base.txt; \
		$(GO) test -run '^$$' -bench '$(BENCH)' $(PKG) >> $(BIN)/head.txt; \
		echo "run $$i of $(COUNT)"; \
	done; \
	$(PEERS)/benchstat base=$(BIN)/base.txt head=$(BIN)/head.txt

.PHONY: clean
clean: ## remove all that was built
	rm -rf $(BIN)
