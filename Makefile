# `.venv` is the environment. It is brought up to date when pyproject.toml or a lock has changed, and
# costs nothing otherwise. Another interpreter: `make setup PYTHON=python3.13`.
PYTHON ?= python3
export PYTHON
export PATH := $(PATH):/usr/sbin

.PHONY: help setup run test check fix bench simulate soak lock clean mosquitto browser

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: .venv/runtime ## make .venv with everything `ordain` needs, pinned by hash

run: .venv/runtime ## the broker, an MQTT server and a few simulated devices, until Ctrl-C
	@exec .venv/bin/ordain serve --demo

test: .venv/dev mosquitto browser check ## everything a change must pass: check, then all tests
	@.venv/bin/pytest

check: .venv/dev ## style and types
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy

fix: .venv/dev ## put style right where a machine can
	@.venv/bin/ruff format
	@.venv/bin/ruff check --fix

bench: .venv/dev mosquitto ## measure this machine
	@.venv/bin/python -m scripts.bench

SEEDS ?= 1000
simulate: .venv/dev ## the real broker under simulated faults, SEEDS seeds of them
	@.venv/bin/python -m scripts.simulate --seeds $(SEEDS)

soak: .venv/dev mosquitto ## the long runs: 100,000 queued commands, memory over 400,000, a server that goes away
	@.venv/bin/python -m scripts.soak

lock: ## resolve the newest allowed dependencies into the locks (needs uv)
	uv lock --upgrade
	uv export --quiet --frozen --no-emit-project --no-header --no-default-groups --group build -o requirements.lock
	uv export --quiet --frozen --no-emit-project --no-header --group dev --group build -o requirements-dev.lock
	uv export --quiet --frozen --no-header --only-group setup -o scripts/setup-uv.lock

clean: ## remove .venv and what tools left behind; never data
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

.venv/runtime: pyproject.toml requirements.lock scripts/setup
	@scripts/setup requirements.lock
	@touch $@

.venv/dev: pyproject.toml requirements-dev.lock scripts/setup
	@scripts/setup requirements-dev.lock
	@touch .venv/runtime $@

mosquitto:
	@scripts/setup-mosquitto

browser:
	@scripts/setup-browser
