# Everything runs in .venv beside the code; the stamp makes set-up quick when nothing changed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.conadv-lab
LAB_STAMP := .venv/.conadv-lab-notebooks
ADAPTERS_STAMP := .venv/.conadv-lab-adapters

KILLS ?= 10

STUDIES := flatness_vs_batch accuracy_vs_batch staleness cost critical_batch epsilon autowu neighbours
# The map of regimes and what belongs to it: measured at the small scale, on a part of CIFAR-10.
MAP := regimes regime_attempts regime_causes
SMOKE := runs/studies/smoke

.PHONY: demo lab test test-all test-gpu test-slurm test-kills test-slow test-adapters test-fresh studies-smoke studies notebooks docs setup lint clean

demo: setup
	$(BIN)/python -m conadv_lab.demo

# JupyterLab, opened on the notebooks; the first time it is installed, with the extra [notebooks].
lab: $(LAB_STAMP)
	$(BIN)/python -m jupyterlab notebooks

$(LAB_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[notebooks]'
	@touch $(LAB_STAMP)

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-all: test test-slow test-adapters studies-smoke test-kills test-slurm

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# The adapters inside the real libraries, which the extra [adapters] installs into .venv beside the same torch, and timm
# without torchvision, which may need another torch. Writes docs/integrations.md's table.
test-adapters: $(ADAPTERS_STAMP)
	CONADV_WORKS_WITH=docs/integrations.md $(BIN)/python -m pytest tests/integrations

$(ADAPTERS_STAMP): $(STAMP)
	@before=$$($(BIN)/python -c 'import torch; print(torch.__version__)') && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[adapters]' && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps timm && \
	after=$$($(BIN)/python -c 'import torch; print(torch.__version__)') && \
	{ [ "$$before" = "$$after" ] || { echo "the extra [adapters] changed torch from $$before to $$after"; exit 1; }; }
	@touch $(ADAPTERS_STAMP)

# Each optional package alone in a fresh environment: torch stays as it was. Not part of test-all: it downloads every extra.
test-fresh: setup
	$(BIN)/python -m tests.fresh

# What only a CUDA device can show.
test-gpu: setup
	CONADV_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

# Runs that are killed and resumed at random moments; make test-kills KILLS=100 takes longer.
test-kills: setup
	$(BIN)/python -m tests.kill_matrix --cases $(KILLS) --ranks 1 2

# On a cluster of two nodes that is started for it, as root on Debian or Ubuntu.
test-slurm: setup
	slurm/local/test

# All studies end to end, in minutes; their figures mean nothing.
studies-smoke: setup
	rm -rf $(SMOKE)
	for study in $(STUDIES) $(MAP); do $(BIN)/python -m analysis.$$study --scale smoke --processes 2 --out $(SMOKE) --runs $(SMOKE)/runs || exit 1; done

# The committed tables and figures; an hour or two on two cores. A run that is there already is not run again.
studies: setup
	for study in $(STUDIES); do $(BIN)/python -m analysis.$$study --scale full --processes 2 || exit 1; done
	$(BIN)/python -m analysis.texts

# The executed copies beside the Python twins; needs the extra [notebooks].
notebooks: setup
	$(BIN)/python -m notebooks.execute

# The site of the documentation, in site/; a dead link fails. Any server of files shows it, as python -m http.server -d site.
docs: setup
	$(BIN)/python -m properdocs build --strict --config-file mkdocs.yml

lint: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/codespell

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"conadv_lab needs Python 3.11 or 3.12, but {sys.executable} is {v[0]}.{v[1]}: run make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv runs build site *.egg-info .mypy_cache .ruff_cache .pytest_cache
