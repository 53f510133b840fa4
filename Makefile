# Everything runs in .venv beside the code; the stamp makes set-up quick when nothing changed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.conadv-lab

KILLS ?= 12

.PHONY: demo test test-all test-slurm test-kills setup lint clean

demo: setup
	$(BIN)/python -m conadv_lab.demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: test test-kills test-slurm

# Runs that are killed and resumed at random moments; make test-kills KILLS=100 takes longer.
test-kills: setup
	$(BIN)/python -m tests.kill_matrix --cases $(KILLS) --ranks 1 2

# On a cluster of two nodes that is started for it, as root on Debian or Ubuntu.
test-slurm: setup
	slurm/local/test

lint: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"conadv_lab needs Python 3.11 or 3.12, but {sys.executable} is {v[0]}.{v[1]}: run make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
