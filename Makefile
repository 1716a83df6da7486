# `make analyze` and `make test` need a Python 3.11 to 3.13 and nothing else; they set up .venv once.
PYTHON ?= python3
PAIRS ?= 500
# More options for the analysis, such as ARGS="--data folder:visible:infrared --model resnet50".
ARGS ?=
BIN := .venv/bin
# One thread a process: the suite runs two processes side by side, and sums then do not depend on the machine.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: analyze test slow lint mutants lock audit notebooks study tables figures docs install test-install clean
.DEFAULT_GOAL := analyze

analyze: install
	@$(BIN)/freqkd-analyze layers --pairs $(PAIRS) $(ARGS)

test: test-install
	@$(PYTEST) -q -n 2 $(ARGS)

slow: test-install
	@$(PYTEST) -q -m slow $(ARGS)

lint: test-install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# What the tests of the numbers do not notice: a table, and the lines of each change that went by.
mutants: test-install
	@$(BIN)/python tools/mutate.py $(ARGS)

# Every version with its digests, for all platforms; changed only where pyproject.toml asks, or with ARGS=--upgrade.
lock: test-install
	@$(BIN)/python -m pip install --quiet "uv>=0.9"
	@$(BIN)/uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --generate-hashes --quiet \
	  --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(ARGS) \
	  --output-file requirements.lock

# Known weaknesses of the locked versions. Asks the package index: the one target beside set-up that needs a network.
audit: test-install
	@$(BIN)/python -m pip install --quiet "pip-audit>=2.9"
	@$(BIN)/python tools/audit.py $(ARGS)

# The runs behind RESULTS.md that are not in runs/ yet (ONLY='vit* lite0': some), then the tables. SUBSETS and DETECTORS
# read the data's lists, so they need FREQKD_TEST_DATA.
ONLY ?=
RUNS ?= $(patsubst %/verdict.json,%,$(wildcard runs/*/verdict.json))
DISTILLED ?= $(patsubst %/heldout/change.csv,%,$(wildcard runs/*/distil/*/heldout/change.csv))
PUBLISHED := $(FREQKD_TEST_DATA)/data/benchmarks/kaist/published_results
PARTED := $(patsubst %,runs/%,vit vit-random lite0 lite0-random lite2 mnv2 mnv2-random)
SUBSETS ?= $(if $(and $(FREQKD_TEST_DATA),$(filter 7,$(words $(wildcard $(PARTED:%=%/divergence.parquet))))),$(PARTED))
DETECTORS ?= $(if $(FREQKD_TEST_DATA),$(wildcard $(PUBLISHED)/KAIST_annotation.json $(PUBLISHED)/*_result.txt*))
DOWNSTREAM ?= $(patsubst %/compare/compare.csv,%,$(wildcard runs/*/compare/compare.csv))

study: install
	@$(BIN)/python study/run.py $(ONLY)
	@$(MAKE) --no-print-directory tables

tables: install
	@$(if $(RUNS),$(BIN)/python study/collect.py $(RUNS),:)
	@$(if $(SUBSETS),$(BIN)/python study/subsets.py $(SUBSETS),:)
	@$(if $(DISTILLED),$(BIN)/python study/distilled.py $(DISTILLED),:)
	@$(if $(DETECTORS),$(BIN)/python study/detectors.py $(DETECTORS),:)
	@$(if $(DOWNSTREAM),$(BIN)/python study/downstream.py $(DOWNSTREAM),:)
	@$(BIN)/python study/page.py RESULTS.md

figures: install
	@for script in $(filter-out figures/common.py,$(wildcard figures/*.py)); do $(BIN)/python $$script || exit; done
	@for name in low_high_by_depth heldout; do cp figures/out/$$name.svg figures/out/$$name.csv docs/images/; done

docs: install
	@$(BIN)/python -m pip install -q -e ".[docs]"
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W -n -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

notebooks: install
	@test -x $(BIN)/jupyter-lab || $(BIN)/python -m pip install --quiet -e ".[notebooks]"
	@$(BIN)/jupyter lab notebooks

install:
	@$(PYTHON) tools/bootstrap.py run

test-install:
	@$(PYTHON) tools/bootstrap.py test

clean:
	rm -rf .venv build dist docs/_build docs/api docs/notebooks .pytest_cache .mypy_cache .ruff_cache .hypothesis
