# The commands people type. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs
NOTEBOOK ?= 03
ARGS ?=

.PHONY: demo test lint lab notebooks train clean

demo: $(VENV)/installed
	@mkdir -p $(RUNS)/quickstart
	$(BIN)/papermill --progress-bar --log-level WARNING --cwd notebooks \
		notebooks/00_quickstart.ipynb $(RUNS)/quickstart/00_quickstart.ipynb \
		-p out_dir "$(abspath $(RUNS)/quickstart)"
	@echo; echo "Figures and table are in $(RUNS)/quickstart:"; ls $(RUNS)/quickstart

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: $(VENV)/installed
	$(BIN)/jupyter lab notebooks

# Stored outputs show embedded pictures only, whatever data sets this machine has.
notebooks: $(VENV)/installed
	env -u FUSIONKIT_SHARED -u FUSIONKIT_DATA $(BIN)/python -m fusionkit.run --store

train: $(VENV)/installed
	$(BIN)/python -m fusionkit.run $(NOTEBOOK) --runs "$(RUNS)" $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fusionkit needs Python 3.11 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@
