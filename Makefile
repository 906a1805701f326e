# `make demo` and `make test` set up all they need in .venv; nothing else on the machine changes.
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check bench proto clean

demo: $(INSTALLED)  ## a coordinator and two volunteers train together on this machine
	@$(PYTHON) -m peer.cli demo

test: $(INSTALLED) check  ## everything that is claimed, shown
	@echo "covey: running the tests"
	@$(PYTHON) -m pytest -q

check: $(INSTALLED)  ## style and types
	@echo "covey: checking style and types"
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy

bench: $(INSTALLED)  ## speed, as ratios measured in one run
	@$(PYTHON) -m benchmarks

proto: $(INSTALLED)  ## generate proto/*_pb2* anew
	@$(PYTHON) -m proto.generate

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(INSTALLED): setup.cfg pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	 { echo "covey: found $$($(BASE_PYTHON) --version); expected Python 3.11 or later. Try make BASE_PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "covey: making .venv and installing PyTorch, hivemind and the rest into it (about 6 GB, 2 to 10 minutes)"
	@test -x $(PYTHON) || $(BASE_PYTHON) -m venv .venv
	@$(PYTHON) -m pip install --quiet --upgrade pip
	@$(PYTHON) -m pip install --quiet --progress-bar on --editable '.[dev]'
	@touch $@
