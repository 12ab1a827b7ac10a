# Everything a fresh machine needs is behind these. `make demo` and `make test` are the two commands of the README.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .peers
PYTHON ?= $(firstword $(foreach v,python3 python3.11 python3.12 python3.13,$(shell $(v) -c 'import sys; sys.version_info >= (3, 11) and print("$(v)")' 2>/dev/null)))
# every tool's telemetry is off; threads that wait don't burn the cores that others need (src/ommatid/executors/workers.py)
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export GOMP_SPINCOUNT := 1000
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo fmt check test lint up docs bench bench-extract bench-train bench-evaluate bench-interop peers constraints clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; install it, or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) with $(PYTHON) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@# uv ignores pip's find-links; bytecode is compiled once, not at every start of every stage
	@UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## the whole line on 10,000 photographs, through the Prefect flow
	@python -m flows.pipeline
	@echo
	@ommatid query "SELECT latent, label, label_score, ms, ms_floor, density, purity FROM features WHERE label IS NOT NULL AND n_images >= 16 ORDER BY ms DESC LIMIT 10"
	@echo
	@echo "look at    file://$(CURDIR)/$$(ommatid show)"
	@echo "           file://$(CURDIR)/data/quality/evaluate.html"
	@echo "one latent $(BIN)/ommatid show 123"
	@echo "ask        $(BIN)/ommatid query \"SELECT ...\""
	@echo "servers    make up"

fmt: $(READY) ## format, and fix what lint can fix
	@ruff format .
	@ruff check --fix .

# Images, models, dictionaries and numbers: the tests that start no server and run no whole line, a minute on two idle cores.
FAST := $(addprefix tests/,activations compute config images metrics sae vlm store/test_artefact.py test_shapes.py)

check: lint ## lint, types, contracts and the fast tests: under two minutes together
	@pytest --numprocesses auto --maxprocesses 4 --dist loadfile --ignore tests/images/test_s3.py $(FAST)

test: lint ## the environment, lint, types, contracts and all tests
	@pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(READY)  ## format, lint, types, import contracts
	@ruff format --check --quiet .
	@ruff check --quiet .
	@pyright --warnings
	@lint-imports --no-cache | tail -n 8

up: $(READY) ## Prefect server, worker and MLflow; Ctrl-C ends all
	@python -m flows.serve

docs: $(READY) ## pages that are made from code
	@python docs/developers/make_artefacts.py
	@python docs/pictures/make_shapes.py

bench: $(READY) ## seconds and memory of every stage
	@python benchmarks/stages.py 10000

bench-extract: $(READY) ## extraction and its store against a bare loop, memmaps and other writers
	@python benchmarks/extract.py 10000

bench-train: $(READY) $(PEERS)/.ready ## training against the peers' trainers and the hardware; an hour
	@python benchmarks/train.py

bench-evaluate: $(READY) ## monosemanticity against the published loop, at full size, and the memory of its stage
	@python benchmarks/evaluate.py

bench-interop: $(READY) $(PEERS)/.ready ## SAEs of other libraries here, and ours there
	@python benchmarks/interop.py

peers: $(PEERS)/.ready ## an environment in .peers with the libraries that benchmarks compare with

$(PEERS)/.ready: benchmarks/peers.txt benchmarks/peers-without.txt $(READY)
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv --without-pip $(PEERS)
	@echo "setting up $(PEERS) (a minute)"
	@UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BIN)/uv pip install --quiet --python $(PEERS)/bin/python -r benchmarks/peers.txt --overrides benchmarks/peers-without.txt
	@touch $@

constraints: $(READY) ## write down the versions that are installed
	@{ head -n 1 constraints.txt; $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | sed 's/+cpu//'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove artefacts; the DVC cache, MLflow and the environment stay
	@rm -rf .worktrees && git worktree prune
	@rm -rf data/.work data/sources data/images data/activations data/sae data/evaluation data/labels data/catalog data/quality data/pictures
