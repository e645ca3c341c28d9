# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make demo    fine-tune a model of images, then a robot, and say where the two reports are
#   make test    the fast test suite
# Variables: PYTHON=python3.12   PIP_ARGS="--index-url URL"   RUN=runs/mine   RECIPE=t2i_mixgrpo   ROBOT=robot_dppo
#   ARGS="train.seed=1"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PIP_ARGS ?=
RECIPE ?= t2i_awm
ROBOT ?= robot_reinflow
RUN ?= runs/demo
ARGS ?=
PROCESSES ?= $(if $(shell command -v nvidia-smi),1,2)
WORKERS ?= 2
TYPED := build/typed

# constraints.txt on every install: the tested versions, torch above all (a newer one may bring gigabytes of CUDA)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: help demo demo-images demo-robots test test-all attack check types format docs wheel-smoke clean
.NOTPARALLEL: # the acts of the demo, which take all cores each

help:
	@echo "make demo         make $(VENV), install, run recipes $(RECIPE) and $(ROBOT), print where the reports are"
	@echo "make demo-images  the first act alone; make demo-robots: the second"
	@echo "make test         make $(VENV), install with the extras [image,robots,dev], run the fast tests"
	@echo "make test-all     the slow tests too"
	@echo "make attack       the tests of kills, mutated configs, a lying reward server and files of strangers, slow ones too"
	@echo "make check        ruff check, ruff format --check, mypy on a normal install"
	@echo "make format       let ruff fix and format"
	@echo "make docs         the documentation as a site, build/docs/index.html"
	@echo "make wheel-smoke  build the wheel and use it outside the repository"
	@echo "make clean        remove $(VENV), builds and caches (runs/ stays)"

# --- the environment: stamps make an install run only when pyproject.toml or constraints.txt changed ---

$(BIN)/python:
	@found=; for p in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$p; break; fi; done; \
	if [ -z "$$found" ]; then echo "rlflow needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi; \
	echo "making $(VENV) with $$found"; $$found -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$$found makes no virtual environment: install its venv module (python3-venv)" >&2; exit 1; }

$(VENV)/.installed-core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing rlflow"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-robots: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing rlflow[robots]"
	@$(INSTALL) -e '.[robots]'
	@touch $@ $(VENV)/.installed-core

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing rlflow[image,robots,dev]"
	@$(INSTALL) -e '.[image,robots,dev]'
	@touch $@ $(VENV)/.installed-core $(VENV)/.installed-robots

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing rlflow[image,robots,dev,docs]"
	@$(INSTALL) -e '.[image,robots,dev,docs]'
	@touch $@ $(VENV)/.installed-core $(VENV)/.installed-robots $(VENV)/.installed-dev

# --- the two commands ---

demo: $(VENV)/.installed-robots demo-images demo-robots
	@echo "Images: $(abspath $(RUN))/images/report.html"
	@echo "Robots: $(abspath $(RUN))/robots/report.html"

demo-images: $(VENV)/.installed-core
	$(BIN)/rlflow train $(RECIPE) $(ARGS) --run $(RUN)/images --processes $(PROCESSES)
	@echo "Report: $(abspath $(RUN))/images/report.html"

demo-robots: $(VENV)/.installed-robots
	$(BIN)/rlflow train $(ROBOT) train.minutes=3 $(ARGS) --run $(RUN)/robots --processes $(PROCESSES)
	@echo "Report: $(abspath $(RUN))/robots/report.html"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist worksteal $(ARGS)

# what strangers, clumsy users and power cuts do, all of it bounded and on this machine alone
attack: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q tests/attacks -n $(WORKERS) --dist worksteal $(ARGS)

# --- for developers ---

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# The editable install reaches envs/, rewards/ and configs/ by an import hook, which a type checker cannot follow: check a normal one.
types: $(VENV)/.installed-dev
	@rm -rf build/lib build/bdist.* $(TYPED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TYPED) .
	@cd $(TYPED) && MYPYPATH=. ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p rlflow \
	  | sed -E -e 's#^rlflow/(envs|rewards|configs)/#\1/#'

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# -E reads every page anew: a page whose warning failed the last build would otherwise pass unread
docs: $(VENV)/.installed-docs
	@$(BIN)/python -m sphinx -E -W --keep-going -q -j $(WORKERS) -d build/doctrees -b html docs build/docs
	@if grep -rnE '<(script|link|img|iframe)[^>]*(src|href)="(https?:)?//' build/docs --include='*.html'; then \
	  echo "the site would fetch this from elsewhere: it has to work offline" >&2; exit 1; fi
	@echo "Site: $(abspath build/docs/index.html)"

wheel-smoke: $(VENV)/.installed-dev
	scripts/wheel_smoke.sh

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
