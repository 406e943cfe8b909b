# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first; the demo alone needs no tools.
# `make test` leaves out what tests/slow.py lists, `make test-slow` runs that, `make test-all` both; each on two cores.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO := $(firstword $(wildcard $(STAMP)) $(VENV)/.reproduce)
VERSION := $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
# A .venv that another Python or a failed attempt has left is made again.
USABLE := "import pip, sys; sys.exit(sys.version_info < (3, 10))"
PYTEST := $(RUN) -m pytest --numprocesses 2

.PHONY: help demo test test-slow test-all docs pictures lint types format release clean

help:
	@echo "make demo       set up .venv, run Deep RFM on digits, write a figure and a table to out/demo"
	@echo "make test       set up .venv, run the fast tests; test-slow: the others; test-all: both"
	@echo "make docs       build the site into build/docs/$(VERSION)"
	@echo "make pictures   draw the committed pictures again from their tables"
	@echo "make lint       ruff and pyright; format: let ruff write"
	@echo "make release    build the package and test it in fresh environments"
	@echo "make clean      remove .venv and everything built"

demo: $(DEMO)
	$(RUN) -m reproduce demo --out out/demo

test: $(STAMP)
	$(PYTEST) --dist worksteal -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) --dist loadgroup -m slow

test-all: test test-slow

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --config-file docs/mkdocs.yml --site-dir "$(CURDIR)/build/docs/$(VERSION)"

pictures: $(STAMP)
	$(RUN) -m reproduce draw --out reproduce/results
	$(RUN) -m bench draw
	$(RUN) docs/draw.py measures

lint: types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(STAMP)
	rm -rf build/types && mkdir -p build/types
	cp -r fastagop bench reproduce build/types/
	cp -r kernels build/types/fastagop/kernels
	$(RUN) -m pyright
	$(RUN) .ci/typed.py

format: $(STAMP)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

$(STAMP): pyproject.toml
	$(RUN) -c $(USABLE) 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

$(VENV)/.reproduce: pyproject.toml
	$(RUN) -c $(USABLE) 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet -e ".[reproduce]"
	touch $@

# An hour and 30 GB of downloads for all Pythons and both versions of torch; ARGS="--python 3.12 --torch newest" is less.
release: $(STAMP)
	$(RUN) .ci/release.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info out
