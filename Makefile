# make demo | test | check | audit | clean. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test check audit clean

demo: $(INSTALLED)
	$(BIN)/mor demo

test: $(INSTALLED)
	$(TESTS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(TESTS)

audit: $(INSTALLED)  # known vulnerabilities of what is installed; asks PyPI's advisories
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' > build/audit/installed.txt
	build/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement build/audit/installed.txt

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .hypothesis

# constraints.txt chooses the exact torch build; without it pip would take the newest, with gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	"mor needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is %d.%d; choose another: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
