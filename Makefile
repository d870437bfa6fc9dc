# `.venv` is the Python environment. make updates it only when pyproject.toml or a lock file has changed.
# To use another interpreter: `make setup PYTHON=python3.13`.
PYTHON ?= python3
export PYTHON
export PATH := $(PATH):/usr/sbin
# Where this is set, every start of Python would compile the whole project again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup run test style test-all test-ends test-simulation check fix docs bench bench-long bench-compare simulate soak faults dist sbom fuzz audit lock clean \
	mosquitto browser api-tools

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: .venv/runtime ## create .venv with all packages that `ordain` needs, pinned by hash

run: .venv/runtime ## run the broker, an MQTT server and a few simulated devices until Ctrl-C
	@exec .venv/bin/ordain serve --demo

test: .venv/dev mosquitto browser api-tools style ## run everything that a change must pass: check, and all tests
	@# The types are checked beside the tests; what was found is shown last.
	@found=$$(mktemp); .venv/bin/mypy >$$found 2>&1 & types=$$!; .venv/bin/pytest; tests=$$?; \
	wait $$types; types=$$?; cat $$found; rm $$found; exit $$((tests | types))

test-all: mosquitto browser ## run all tests with every Python from 3.11 on that this machine has
	@scripts/test-pythons all

test-ends: mosquitto ## run unit and integration tests with the oldest and the newest Python here
	@scripts/test-pythons ends

test-simulation: .venv/dev ## run 300 seeds and all planted bugs of the simulation; takes several minutes
	@ORDAIN_SIMULATION=whole .venv/bin/pytest --timeout 3600 tests/simulation/test_simulation.py

check: style ## check style and types
	@.venv/bin/mypy

style: .venv/dev
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check

fix: .venv/dev ## correct style automatically where possible
	@.venv/bin/ruff format
	@.venv/bin/ruff check --fix

docs: .venv/dev ## build the documentation as a site in dist/site
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict --config-file .mkdocs.yml

JSON ?=
bench: .venv/dev mosquitto ## measure this machine; JSON=FILE writes the named figures
	@.venv/bin/python -m scripts.bench $(if $(JSON),--json $(JSON))

bench-long: .venv/dev mosquitto ## measure a million events read again, growth, purges, latencies, travel in time, PostgreSQL, peers and failover
	@.venv/bin/python -m scripts.bench --only h --events 1000000
	@.venv/bin/python -m scripts.bench.growth
	@.venv/bin/python -m scripts.bench.purge
	@.venv/bin/python -m scripts.bench.latency
	@.venv/bin/python -m scripts.bench.travel
	@.venv/bin/python -m scripts.bench.postgresql
	@.venv/bin/python -m scripts.bench.peers
	@.venv/bin/python -m scripts.failover --rounds 50 --open 1000 --creates 1000
	@.venv/bin/python -m scripts.failover --rounds 5 --open 100000

OLD ?= HEAD~1
bench-compare: .venv/dev mosquitto ## measure the commit OLD and this one in turn, and compare
	@.venv/bin/python -m scripts.bench.compare $(OLD)

SEEDS ?= 1000
simulate: .venv/dev ## run the real broker under simulated faults, with SEEDS seeds; a second call goes on where the first ended
	@.venv/bin/python -m scripts.simulate --seeds $(SEEDS) --keep .simulate.jsonl

soak: .venv/dev mosquitto ## long runs: 100,000 and 1,000,000 queued commands, 5,000 devices at once, twice the load, memory, outages
	@.venv/bin/python -m scripts.soak backlog
	@.venv/bin/python -m scripts.soak backlog --devices 5000 --count 50000
	@.venv/bin/python -m scripts.soak drain
	@.venv/bin/python -m scripts.soak overload
	@.venv/bin/python -m scripts.soak slope
	@.venv/bin/python -m scripts.soak away

MINUTES ?= 10
faults: .venv/dev mosquitto ## MINUTES of kills, cuts, clock steps, full disks and power cuts with real processes; as root all of them
	@.venv/bin/python -m scripts.soak faults --minutes $(MINUTES)

dist: .venv/dev ## the packages ordain and ordain-device, into dist/
	@.venv/bin/python -m scripts.dist

sbom: .venv/dev ## the list of components of a broker (CycloneDX), into dist/
	@.venv/bin/python -m scripts.sbom

FUZZ ?= 600
fuzz: .venv/dev ## search for input that breaks a rule, FUZZ seconds for each target
	@nice -n 19 .venv/bin/python -m scripts.fuzz --seconds $(FUZZ)

audit: .venv/dev ## search for known mistakes in the code and known vulnerabilities of the packages
	@.venv/bin/python -m scripts.audit

lock: ## write the newest allowed dependencies into the lock files (needs uv)
	uv lock --upgrade
	uv export --quiet --frozen --no-emit-project --no-header --no-default-groups --group build -o requirements.lock
	uv export --quiet --frozen --no-emit-project --no-header --group dev --group build -o requirements-dev.lock
	uv export --quiet --frozen --no-header --only-group setup -o scripts/setup-uv.lock

clean: ## remove .venv and the caches of tools; never data
	rm -rf .venv .venvs .uv .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz dist

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

api-tools: .venv/dev
	@scripts/setup-api-tools || echo "without them some tests are skipped" >&2
