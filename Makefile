# Needs Python 3.11 or newer, make and a package index; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench bench-peers bench-pruning clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  %-13s %s\n' "$$name" "$$text"; done

demo: .venv/installed ## Train, quantize, export and measure a small network; report in demo-output/
	$(BIN)/slimgraph demo --out demo-output

test: .venv/installed ## Run the fast tests
	$(BIN)/pytest -n 2 --dist worksteal

test-all: .venv/installed ## Run all tests, the slow ones too
	$(BIN)/pytest -n 2 --dist worksteal -m ""

lint: .venv/installed ## Check style, formatting and types
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/installed ## Run every benchmark; the results in docs/benchmarks.md come from these
	@set -e; for script in $(filter-out benchmarks/against_peers.py benchmarks/prune_coverage.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python "$$script"; done

bench-peers: .venv/installed .venv-nncf/installed .venv-torchao/installed ## Compare with other tools, each in its environment
	$(BIN)/python benchmarks/against_peers.py

bench-pruning: .venv/installed .venv-torch-pruning/installed ## Prune every family of networks, and let Torch-Pruning try; takes hours
	$(BIN)/python benchmarks/prune_coverage.py
	.venv-torch-pruning/bin/python benchmarks/peers/torch_pruning_coverage.py
	$(BIN)/python benchmarks/prune_coverage.py --publish

clean: ## Remove the environment, caches and results
	rm -rf .venv .venv-nncf .venv-torchao .venv-torch-pruning demo-output .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an installation that was interrupted is taken up again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer. Name one that is, for example: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up .venv; the first time takes some minutes."
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# torch comes first, by itself: what depends on it would take the newest build, with gigabytes of CUDA.
.venv-%/installed: benchmarks/peers/requirements-%.txt constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@
