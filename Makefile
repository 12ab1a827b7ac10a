# Commands for users and developers; each sets up its environment first. `make demo` and `make test` are the two that README.md names.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .peers
PYTHON ?= $(firstword $(foreach v,python3 python3.11 python3.12 python3.13,$(shell $(v) -c 'import sys; sys.version_info >= (3, 11) and print("$(v)")' 2>/dev/null)))
# Turn off the telemetry of all tools, and shorten the busy-waiting of OpenMP threads (see src/ommatid/executors/workers.py)
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export GOMP_SPINCOUNT := 1000
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo fmt check test-fast test lint up docs bench bench-extract bench-train bench-evaluate bench-serve bench-attribute bench-intervene bench-operations bench-interop week peers constraints clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 17

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; install it, or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) with $(PYTHON) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@# uv ignores pip's find-links, so they are passed on; bytecode is compiled here, as stages would otherwise start more slowly
	@UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## run the whole pipeline on 10,000 photographs, as a Prefect flow
	@python -m flows.pipeline
	@echo
	@ommatid query "SELECT latent, label, label_score, ms, ms_floor, density, purity FROM features WHERE label IS NOT NULL AND n_images >= 16 ORDER BY ms DESC LIMIT 10"
	@echo
	@echo "look       $(BIN)/ommatid serve          then open http://127.0.0.1:8321"
	@echo "look at    file://$(CURDIR)/$$(ommatid show)"
	@echo "           file://$(CURDIR)/data/quality/evaluate.html"
	@echo "one latent $(BIN)/ommatid show 123"
	@echo "ask        $(BIN)/ommatid query \"SELECT ...\""
	@echo "servers    make up"

fmt: $(READY) ## format the code, and fix what lint can fix
	@ruff format .
	@ruff check --fix .

check: ## run the checks of `make lint` and the fast tests side by side; takes under two minutes on two idle cores
	@$(MAKE) --no-print-directory --jobs 2 lint test-fast

# Fast tests start no server, run no pipeline and train no SAE in full. They take about a minute on two idle cores.
FAST := $(addprefix tests/,activations compute config images metrics sae vlm store/test_artefact.py test_shapes.py)
SLOW := $(addprefix tests/,images/test_s3.py sae/test_trainer.py)

test-fast: $(READY)
	@pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(addprefix --ignore=,$(SLOW)) $(FAST)

test: lint ## run the checks of `make lint` and all tests
	@pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## check formatting, lint, types and import contracts
	@ruff format --check --quiet .
	@ruff check --quiet .
	@pyright --warnings
	@lint-imports --no-cache | tail -n 8

up: $(READY) ## start the explorer, the Prefect server, its worker and MLflow; Ctrl-C ends all of them
	@python -m flows.serve

docs: $(READY) ## regenerate the pages and pictures that are made from code
	@python docs/developers/make_artefacts.py
	@python docs/pictures/make_shapes.py

bench: $(READY) ## measure time and memory of every stage
	@python benchmarks/stages.py 10000

bench-extract: $(READY) ## compare extraction and its store with a bare loop, memmaps and other writers
	@python benchmarks/extract.py 10000

bench-train: $(READY) $(PEERS)/.ready ## compare training with the peers' trainers and with the hardware; takes an hour
	@python benchmarks/train.py

bench-evaluate: $(READY) ## compare monosemanticity with the published loop at full size, and measure the memory of the stage
	@python benchmarks/evaluate.py

bench-serve: $(READY) ## measure the explorer's pages over a generated catalogue of 65,536 latents, which takes minutes to make
	@python benchmarks/serve.py

bench-attribute: $(READY) ## compare attribution of an output to all latents with ablating them one by one
	@python benchmarks/attribute.py

bench-intervene: $(READY) ## compare interventions with running the whole model for each, and measure the stage of the demo
	@python benchmarks/intervene.py

bench-operations: $(READY) ## measure an increment, a retrain with nothing new, a drift check and the stage images
	@python benchmarks/operations.py

week: $(READY) ## let a week of photographs come in to a clone that runs by itself, and check what happens; takes twelve minutes
	@PYTHONPATH="$(CURDIR):$(CURDIR)/tests" python benchmarks/week.py

bench-interop: $(READY) $(PEERS)/.ready ## compare SAEs of other libraries imported here, and ours exported there
	@python benchmarks/interop.py

peers: $(PEERS)/.ready ## set up an environment in .peers with the libraries that the benchmarks compare with

$(PEERS)/.ready: benchmarks/peers.txt benchmarks/peers-without.txt $(READY)
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv --without-pip $(PEERS)
	@echo "setting up $(PEERS) (a minute)"
	@UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BIN)/uv pip install --quiet --python $(PEERS)/bin/python -r benchmarks/peers.txt --overrides benchmarks/peers-without.txt
	@touch $@

constraints: $(READY) ## record the installed versions in constraints.txt
	@{ head -n 1 constraints.txt; $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | sed 's/+cpu//'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove the artefacts, but not the DVC cache, the MLflow store or the environment
	@rm -rf .worktrees && git worktree prune
	@rm -rf data/.work data/sources data/images data/activations data/sae data/evaluation data/labels data/interventions data/catalog data/quality data/pictures
