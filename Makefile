# Two commands do everything on a fresh machine: `make quickstart` and `make test`. Both share `make install`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A process a core, up to four, each with one thread: nearly twice as fast as one process whose threads wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

# Exports for OpenVINO need libraries that training cannot live with: an environment of their own.
OPENVINO := .venv-openvino

.PHONY: install quickstart test test-fast test-slow openvino lint types format docs clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/slmops quickstart -o slmops-quickstart

test: test-fast test-slow

test-fast: $(VENV)/installed-dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m slow

# The tests that need OpenVINO, in its environment.
openvino: $(OPENVINO)/installed
	OMP_NUM_THREADS=1 $(OPENVINO)/bin/python -m pytest -n logical --maxprocesses 2 --dist loadfile tests/test_openvino.py

# optimum-intel asks for torchvision and does not need it here; one that is built for another torch breaks transformers' models.
$(OPENVINO)/installed: pyproject.toml constraints-openvino.txt
	@test -x $(OPENVINO)/bin/python || $(PYTHON) -m venv $(OPENVINO)
	$(OPENVINO)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-openvino.txt -e '.[openvino]' pytest pytest-timeout pytest-xdist
	$(OPENVINO)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision
	@touch $@

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check slmops tests benchmarks deploy adapters olive_configs
	$(BIN)/ruff check slmops tests benchmarks deploy adapters olive_configs

types: $(VENV)/installed-dev
	$(BIN)/pyright

format: $(VENV)/installed-dev
	$(BIN)/ruff format slmops tests benchmarks deploy adapters
	$(BIN)/ruff check --fix slmops tests benchmarks deploy adapters

docs: $(VENV)/installed-dev
	$(BIN)/python -m slmops.cli.reference > docs/commands.md
	$(BIN)/python -m slmops.cli.reference targets > docs/targets.md
	$(BIN)/python -m slmops.demo.recipes adapters

clean:
	rm -rf $(VENV) $(OPENVINO) slmops-quickstart
