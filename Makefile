# One environment, two sizes: `make book` installs what renders stored notebooks, everything else installs all.
PYTHON ?= python3
# Empty: the newest versions of everything (the weekly run).
CONSTRAINTS ?= constraints.txt
PORT ?= 8000

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# What is in the folders, not the folders: they are called like targets.
INPUTS := $(shell find _config.yml _toc.yml book/* notebooks/* kexue_utils/* tools/* \
	\( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -o -print 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help book serve test notebooks ledger bench lint nightly set-repo clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

book: _build/.built  ## render the stored notebooks to _build/html
	@$(PY) -c "import pathlib; print('open', pathlib.Path('_build/html/index.html').resolve().as_uri())"

_build/.built: $(VENV)/.book $(INPUTS)
	@$(PY) -m tools.book
	@touch $@

serve: book  ## show the book on localhost (PORT=8000)
	@echo "http://localhost:$(PORT)/ (Ctrl-C ends it)"
	@$(PY) -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

test: $(VENV)/.all  ## everything that must hold before a change is merged
	@$(PY) -m ruff check --quiet .
	@$(PY) -m pytest --numprocesses auto --dist loadfile --nbval notebooks tests
	@TRITON_INTERPRET=1 $(PY) -m pytest --numprocesses auto tests/optimization/test_tiger_fused.py  # no GPU needed

notebooks: $(VENV)/.all  ## execute the texts (ONLY=part/slug) and store them as notebooks
	@$(PY) -m tools.notebooks run $(ONLY)

ledger: $(VENV)/.book  ## read the notebooks' checks into book/ledger.json (ACCEPT=label)
	@$(PY) -m kexue_utils.ledger collect $(if $(ACCEPT),--accept $(ACCEPT))

bench: $(VENV)/.all  ## our implementations beside the best public ones (STORE=1 keeps the tables for the book)
	@for script in $$(find benchmarks -name 'bench_*.py' | sort); do \
	  echo "== $$script"; module=$$(echo $${script%.py} | tr / .); kept=$${script%.py}.cpu.txt; \
	  $(PY) -m $$module > $(VENV)/bench.txt || { cat $(VENV)/bench.txt; exit 1; }; cat $(VENV)/bench.txt; \
	  if [ -n "$(STORE)" ]; then cp $(VENV)/bench.txt $$kept; fi; done

lint: $(VENV)/.all  ## ruff, on the notebooks too
	@$(PY) -m ruff check .

nightly: $(VENV)/.all  ## every check again with other draws and all its mutants; stores nothing
	@LEDGER_ALL_MUTANTS=1 LEDGER_SEED_SHIFT=$${LEDGER_SEED_SHIFT:-1} $(PY) -m tools.notebooks run --discard

set-repo: $(VENV)/.book  ## write another repository address everywhere (URL=https://github.com/owner/name)
	@$(PY) -m tools.repository "$(URL)"

clean:  ## remove the environment and all that was built
	rm -rf $(VENV) _build build dist .pytest_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV)

# Rendering needs neither torch nor numpy: the package comes without what it depends on.
$(VENV)/.book: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing what renders the book (once)"
	@$(PY) tools/requirements.py book > $(VENV)/book.txt
	@$(PIP) setuptools -r $(VENV)/book.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.all: $(VENV)/.book
	@echo "installing everything (once)"
	@$(PIP) torch --editable '.[book,dev]' --no-build-isolation
	@touch $@
