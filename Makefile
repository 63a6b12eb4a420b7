# Each target stands alone: it makes .venv and installs into it when that has not been done.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-all lint install clean

help:
	@echo "make demo      simulate a small scan, map its strain, open runs/demo/report.html afterwards"
	@echo "make test      the default tests (no GPU, no cluster, minutes)"
	@echo "make test-all  the slow tests and those on a real SLURM as well"
	@echo "make lint      ruff, mypy, codespell"
	@echo "make install   only set up .venv"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("fcunet needs Python 3.11 or newer, this is %d.%d; try: make PYTHON=python3.12 $(MAKECMDGOALS)" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[io,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fcunet demo --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell fcunet tests workflows benchmarks cluster docs README.md CONTRIBUTING.md CHANGELOG.md

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
