# Each command does its own set-up on a fresh machine (Python >= 3.11 with venv, make, network to the package index):
#   make demo    two real models: quantized, verified, served, scored beside the original
#   make test    formatter, linter, type checker, the whole test suite
#   make check   the same without what needs an engine or a real model: minutes instead of half an hour
#   make fuzz    300,000 damaged files, read as the commands read them: half an hour
#   make kills   200 kills at random moments of every command that writes, and 200 of quantize --push: twenty minutes
#   make emulate the INT8 tiles of other CPUs, in the emulators that are here: seconds
#   make support the table of supported architectures: tiny models of all, also in vLLM; goes on where it was interrupted
#   make docs    the documentation site, in site/

PYTHON ?= python3
BIN := .venv/bin
LONG := engine or model or slow

# Two processes of one thread each; fixtures that last for a file are made once. The longest files begin first, in the
# order of tests/conftest.py.
SHARED := --numprocesses 2 --dist loadfile --no-loadscope-reorder
test check short: export OMP_NUM_THREADS := 1

# Commands start by the hundred in the tests, and each would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check short fuzz kills emulate support lint docs vllm bench clean

demo: .venv/.demo
	@$(BIN)/python scripts/demo.py .demo

# Both environments are built at the same time, and the linters run beside the short tests.
test:
	@$(MAKE) --jobs 2 check vllm
	$(BIN)/pytest -q -m "$(LONG)" $(SHARED)

check: lint short

short: .venv/.dev
	$(BIN)/pytest -q -m "not ($(LONG))" $(SHARED)

fuzz: .venv/.dev
	W8A8_FUZZ=300000 $(BIN)/pytest -q tests/fuzzing --timeout 7200

kills: .venv/.dev
	W8A8_KILLS=200 $(BIN)/pytest -q tests/test_kills.py tests/publish/test_interrupted.py

emulate: .venv/.dev
	$(BIN)/python scripts/emulate_tiles.py

support: .venv/.dev vllm
	$(BIN)/python -m tests.support --vllm .venv-vllm/bin/python

docs: .venv/.docs
	$(BIN)/mkdocs build --strict

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Stock vLLM, in an environment of its own: the tests that serve with it are skipped where it cannot be had.
vllm:
	@$(PYTHON) scripts/make_vllm.py .venv-vllm || echo "no vLLM here; tests that need it will be skipped"

bench: .venv/.demo
	$(BIN)/w8a8 bench quantize

clean:
	rm -rf .venv .venv-vllm .demo .example .cache site .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch goes first and is pinned, so that nothing brings another build of it later.
.venv/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "w8a8 needs Python 3.11 or newer; try make PYTHON=python3.12")'
	@echo "installing w8a8[$*] and what it needs into .venv, once: torch (large), transformers and smaller packages"
	@test -x $(BIN)/pip || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@$(BIN)/pip install --quiet torch==2.13.0
	@$(BIN)/pip install --quiet --editable '.[$*]'
	@$(BIN)/python scripts/mend_torchvision.py
	@touch $@
