# The one task runner. `make demo` and `make test` do all set-up themselves, on a fresh Debian 12 with Rust.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PACKAGES := $(shell grep -hv '^\#' installer/image/packages.txt tests/packages.txt)
TARGET := $(or $(CARGO_TARGET_DIR),target)
BIN := $(TARGET)/release

.PHONY: help setup demo lab-down test check fmt clippy unit simulation fuzz soak e2e e2e-native e2e-lab bench bench-storage bench-vmm bench-migration release image iso

help: ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 14

setup: ## Install the Debian packages that the build and the lab need
	@tests/setup $(PACKAGES)

demo: setup release iso ## Three servers from the ISO, a cluster, VMs, a lost server: the product's main job (KEEP=1 leaves the lab up)
	@$(BIN)/demo --iso $(TARGET)/image/hci.iso --lab target/lab $(if $(KEEP),--keep)

lab-down: ## End the lab that `make demo KEEP=1` left and free everything
	@$(BIN)/hci-image lab down --dir target/lab

test: setup fmt clippy unit simulation e2e ## All tests, from format to the end-to-end run in the lab

check: fmt clippy unit ## The quick loop: format, clippy, unit and property tests

fmt:
	@echo "== format"
	cargo fmt --all --check

clippy:
	@echo "== clippy"
	cargo clippy --workspace --all-targets --locked -- -D warnings

unit:
	@echo "== unit and property tests"
	cargo test --workspace --lib --bins --locked

# The simulated crashes that CI tries, each time the same ones; `make unit` has the first of them. The soak has others.
SIMULATED := invariants_hold no_crash_loses astray flipped_bit

# Those of the crates, by name: with another choice of packages all dependencies would be compiled once more.
COMPONENTS := $(foreach test,$(wildcard vmm/tests/*.rs storage/tests/*.rs netfabric/tests/*.rs hci-node/tests/*.rs),--test $(basename $(notdir $(test))))

simulation:
	@echo "== simulation and component tests"
	cargo test --workspace --locked $(COMPONENTS)
	@echo "== thousands of simulated histories"
	STORAGE_SIM_SEEDS=1000 STORE_SEEDS=2000 cargo test -p storage --lib --release --locked -- $(SIMULATED)

# Of the tests of `make unit`, those that decode what a peer, a disk or a guest may send.
HOSTILE := garbage any_bytes hostile_ random_descriptors changed_on_its_way malformed damaged_

fuzz: ## Hostile input for every decoder, much longer than the unit tests do (CASES=200000)
	PROPTEST_CASES=$(or $(CASES),200000) cargo test -p storage -p netfabric -p vmm -p hci-node --lib --release --locked -- $(HOSTILE)

soak: ## The storage engine simulated with as many seeds as you like (SEEDS=10000, FROM=0)
	STORAGE_SIM_FROM=$(or $(FROM),0) STORAGE_SIM_SEEDS=$(or $(SEEDS),10000) STORE_SEEDS=$(or $(SEEDS),10000) cargo test -p storage --lib --release --locked -- --nocapture $(SIMULATED)

# Built together always, for the same reason.
RELEASED := -p hci-node -p installer -p tests

e2e: e2e-native e2e-lab

e2e-native: release
	@echo "== end to end: real processes in network namespaces"
	HCI_BIN=$(abspath $(BIN)) cargo test $(RELEASED) --release --locked --test native -- --test-threads 1 --nocapture

e2e-lab: release iso
	@echo "== end to end: three servers in the lab, with faults"
	$(BIN)/demo --iso $(TARGET)/image/hci.iso --lab target/lab --faults
	@echo "== end to end: an install that nobody attends"
	$(BIN)/unattended --iso $(TARGET)/image/hci.iso --lab target/lab

bench: setup release ## Our storage and overlay beside the raw medium and the bare link
	@$(BIN)/bench --hci $(BIN)/hci --out target/bench

bench-storage: setup release ## A volume beside the raw medium, qemu-storage-daemon and Ceph
	@tests/setup $(shell grep -hv '^\#' tests/packages-peers.txt)
	@$(BIN)/bench --storage --hci $(BIN)/hci --out target/bench

bench-vmm: setup release bench-migration ## What the VMM costs a guest that boots, in instructions, and one that moves
	@$(BIN)/bench --vmm --hci $(BIN)/hci --out target/bench

bench-migration: setup release ## How long guests of 2 GiB are paused that move between three nodes
	@mkdir -p target/bench
	MIGRATION_FIGURES=$(abspath target/bench/migration.json) cargo test $(RELEASED) --release --locked --test migrate -- --ignored --nocapture

release:
	@echo "== build (release)"
	cargo build --release --locked $(RELEASED)

image: release ## Build the root image
	@$(BIN)/hci-image image --hci $(BIN)/hci --out $(TARGET)/image

iso: image ## Build the install ISO
	@$(BIN)/hci-image iso --out $(TARGET)/image
