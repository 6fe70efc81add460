# Set-up, demo, tests and checks. Each target makes what it needs, from a fresh clone on.
#
# Needed beforehand: git, make, and Python 3.11 to 3.14 with venv. The tests compare with learn2learn,
# which takes gcc, the headers of Python, and 3.11 or 3.12; with a newer Python they do without.
# `make demo PYTHON=python3.12` selects the interpreter.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
# Conflicts are not reported: learn2learn asks for packages that it can do without (see below).
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts

DEMO_FLAGS := --dataset glyphs --rules uniform,agreement,norm-control --ways 5 --shots 1 \
  --hidden 32 --seeds 5 --iterations 80 --validate-every 40 --validation-episodes 50 --episodes 300 \
  --threads 1 --jobs 2
DOCS := .venv-docs
PACKAGE := .venv-package
BENCH_FLAGS := --config omniglot-5w1s --threads 2
GPU_CHECK_FLAGS := --json runs/gpu-check.json
PYTEST_FLAGS :=

.PHONY: help demo test lint format docs package bench gpu-check learn2learn clean FORCE

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Compare MAML with gradient agreement on the embedded data; results in runs/demo
	$(VENV)/bin/gametalearn compare $(DEMO_FLAGS) --out runs/demo --overwrite

test: $(VENV)/.installed-learn2learn ## Run the tests (PYTEST_FLAGS="-k name" and the like are passed on)
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev ## Check format, style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev ## Format, and mend what can be mended
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(DOCS)/.installed ## Build the documentation into site/, and check it; open site/index.html
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	$(DOCS)/bin/python docs/scripts/check_site.py site

package: $(PACKAGE)/.installed ## Build the source archive and the wheel into dist/, and check them
	rm -rf build dist
	$(PACKAGE)/bin/python -m build
	$(PACKAGE)/bin/python -m twine check --strict dist/*

bench: $(VENV)/.installed-learn2learn ## Time a meta-gradient against learn2learn's; result in runs/bench.json
	mkdir -p runs
	$(VENV)/bin/gametalearn bench $(BENCH_FLAGS) --json runs/bench.json

gpu-check: $(VENV)/.installed-learn2learn ## Check and time the library on a GPU; result in runs/gpu-check.json
	$(VENV)/bin/python -m experiments.gpu_check $(GPU_CHECK_FLAGS)

learn2learn: $(VENV)/.installed-learn2learn ## Build learn2learn 0.2.0 and install it into .venv (Python 3.11 or 3.12)

clean: ## Remove the environments, the site, built wheels and caches; runs/ and prepared data stay
	rm -rf $(VENV) $(DOCS) $(PACKAGE) site .wheels build dist *.egg-info
	rm -rf .nox .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, in stages: what a user gets; the tools and extras that the tests need;
# learn2learn. A stamp says that a stage is complete, so an interrupted one is done again.
# Nothing here pins numpy: every stage leaves it as the stage before it did, and the demo runs
# on the same versions whether the tests came first or not.

$(VENV)/.python: FORCE
	@sh .ci/make_venv.sh $(VENV) $(PYTHON)

$(VENV)/.installed: $(VENV)/.python pyproject.toml
	@echo "Installing gametalearn into $(VENV); the first time takes minutes, most of them for torch."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests and checks need."
	@$(PIP) --editable '.[dev,torchjd,tensorboard,torchvision]'
	@touch $@

# Of learn2learn's dependencies it imports gym and requests always, qpth for its MetaOptNet only.
# We leave qpth out: it would hold numpy below 2 for everything in the environment.
$(VENV)/.installed-learn2learn: $(VENV)/.installed-dev .ci/build_learn2learn.sh
	@if $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then \
	  bash .ci/build_learn2learn.sh $(VENV)/bin/python .wheels && \
	  $(PIP) gym==0.26.2 requests && \
	  $(PIP) --no-deps --no-index --find-links .wheels learn2learn==0.2.0; \
	else \
	  echo "Leaving learn2learn out: it does not build with Python 3.13 or newer."; \
	fi
	@touch $@

# The documentation and the archives have environments of their own: they are made from the source text,
# without torch, and what makes them does not meet what the library needs. Groups of requirements came
# with pip 25.1.
$(DOCS)/.python $(PACKAGE)/.python: FORCE
	@sh .ci/make_venv.sh $(@D) $(PYTHON)

.venv-%/.installed: .venv-%/.python pyproject.toml
	@echo "Installing what \`make $*\` needs into $(@D)."
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check 'pip>=25.1'
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --group $*
	@touch $@
