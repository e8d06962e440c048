# Everything a developer types. `make demo` and `make test` do all set-up on a machine with Python >= 3.11 and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Two processes: the suite is many short tests, and two cores are the least that a developer or CI has.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist worksteal
# What to test: `make test TESTS=tests/dsl`, `make test TESTS="tests/lowering -k shapes"`.
TESTS ?= tests
ROUNDS ?= 10

.DEFAULT_GOAL := help
.PHONY: help env demo test test-gpu soak soak-layouts check bench bench-gpu bench-gpu-programs bench-programs bench-layouts build-all clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r target text; \
		do printf '%-14s %s\n' "$$target" "$$text"; done

env: $(READY)  ## make .venv with everything; does nothing where it is up to date

demo: $(READY)  ## from a spec to a model that was trained here, for a few minutes, and writes
	@$(BIN)/python examples/demo.py

test: $(READY)  ## all tests; TESTS="..." for some
	$(PYTEST) $(TESTS)

test-gpu: $(READY)  ## tests of what runs on a GPU; skipped where there is none
	$(BIN)/pytest -m gpu $(TESTS)

soak: $(READY)  ## the same properties on new random examples, ROUNDS times
	@for round in $$(seq $(ROUNDS)); do echo "round $$round of $(ROUNDS)"; \
		$(PYTEST) --quiet --hypothesis-profile=soak $(TESTS) || exit 1; done

soak-layouts: $(READY)  ## 500 new random layouts and pipelines against one device (a quarter of an hour); the result is committed
	$(BIN)/python -m heddle.benchmarks.layout_soak --json benchmarks/results/layout_soak.json

check: $(READY)  ## what needs no running: ruff and mypy
	$(BIN)/ruff check .
	@mkdir -p .venv/typed && ln -sfn ../.. .venv/typed/heddle
	MYPYPATH=.venv/typed $(BIN)/mypy -m heddle -p heddle.dsl -p heddle.lowering -p heddle.codegen -p heddle.runtime

bench: $(READY)  ## time Heddle and transformers on this CPU, the same weights
	$(BIN)/python benchmarks/cpu.py

bench-gpu: $(READY)  ## on this GPU: kernels and whole models, line by line, against peers; ARGS="--minutes 10" for a part
	$(BIN)/python -m heddle.benchmarks.gpu $(ARGS)

bench-gpu-programs: $(READY)  ## on this GPU: what `make bench` runs; long sequences and retrieval, which train longer there
	$(BIN)/python benchmarks/cpu.py --device cuda --json benchmarks/results/gpu.json
	$(BIN)/python -m heddle.benchmarks.long_context --device cuda --no-loss --scores 16384 \
		--json benchmarks/results/long_context_gpu.json
	$(BIN)/python -m heddle.benchmarks.retrieval --device cuda --steps 10000 --batch 32 --jobs 9 --plain \
		--json benchmarks/results/retrieval_gpu.json

bench-programs: $(READY)  ## the reference programs against what they replace: losses of three seeds, time, memory
	$(BIN)/python -m heddle.benchmarks.long_context --json benchmarks/results/long_context.json
	$(BIN)/python -m heddle.benchmarks.retrieval --plain --json benchmarks/results/retrieval.json
	$(BIN)/python -m heddle.benchmarks.retrieval --lines 0 --json benchmarks/results/retrieval_files.json
	$(BIN)/python -m heddle.benchmarks.compression --json benchmarks/results/compression.json

bench-layouts: $(READY)  ## how long plans take; a laid-out module against one by hand; every mutant against the proof (half an hour)
	$(BIN)/python -m heddle.benchmarks.layouts --json benchmarks/results/layouts.json
	$(BIN)/python -m heddle.benchmarks.layout_overhead --json benchmarks/results/layout_overhead.json
	$(BIN)/python -m heddle.benchmarks.layout_mutants --json benchmarks/results/layout_mutants.json

build-all: $(READY)  ## build the kernels of every shipped model at its published size for every GPU, without one (an hour)
	$(BIN)/python -m heddle.benchmarks.builds --cache .venv/builds --json benchmarks/results/builds.json

clean:  ## remove .venv, build and the caches of the tools
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools comes first and is not isolated: so the pinned one builds the package, and it is fetched once.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Heddle needs Python 3.11 or newer; if one has another name: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'setting up .venv: the first time this fetches torch and takes a few minutes'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --editable '.[test]'
	@touch $@
