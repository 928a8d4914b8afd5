# Every target sets up all that it needs in .venv, on a fresh clone too.
#   PYTHON  the Python, >= 3.10, that makes .venv     (python3)
#   TORCH   what pip installs as torch                (torch==2.13.0)
#   ARGS    passed on: make test ARGS="-k gemm -x", make demo ARGS=--quick, make bench ARGS=lstm
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
empty :=
INTERPRETED_LSTM := $(wildcard tests/ops/test_lstm*.py) tests/ops/test_noise.py tests/ops/test_gemm.py
PARTS := test-core test-cuda test-rest test-ops test-nn test-triton-rest test-triton-lstm test-kernels
TWO = $(MAKE) --no-print-directory -j2 --output-sync=target
EXTRAS := $(addprefix $(VENV)/.,bench docs trainers wheel)
TOOLS := $(VENV)/.tools-$(subst /,_,$(subst $(empty) ,_,$(TORCH)))

# a developer's build: both doors or an error, and the AVX-512 body compiled with AVX2 flags, which the tests run
export FASTSEQ_BUILD ?= torch
export FASTSEQ_BUILD_TEST_ISA ?= 1

.PHONY: demo test $(PARTS) test-triton bench check check-gpu budget format clean gpu
.PHONY: wheel check-wheel hub check-arm check-breaks check-trainers docs nightly

demo: $(VENV)/.built
	$(BIN)/fastseq demo $(ARGS)

# without ARGS in parts, two at a time, the longest first; each prints when it is done. ARGS go to one pytest
test: $(VENV)/.built $(VENV)/.pretrained
	$(if $(ARGS),,@echo "$(words $(PARTS)) parts, two at a time; each prints when it is done, the first after minutes")
	$(if $(ARGS),$(BIN)/python -m pytest $(ARGS),$(TWO) $(PARTS))

# several processes share the cores: a thread that waits gives its core away, instead of spinning
test $(PARTS): export OMP_WAIT_POLICY ?= passive

test-ops test-core test-cuda test-kernels: test-%: $(VENV)/.built
	$(BIN)/python -m pytest tests/$*

test-nn: $(VENV)/.built $(VENV)/.pretrained
	$(BIN)/python -m pytest tests/nn tests/convert

test-rest: $(VENV)/.built
	$(BIN)/python -m pytest tests $(addprefix --ignore=tests/,ops core cuda kernels nn convert)

# the Triton kernels on the CPU, through triton's interpreter, which is chosen when triton is imported
test-triton: $(VENV)/.built
	$(TWO) test-triton-lstm test-triton-rest

test-triton-lstm: $(VENV)/.built
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED_LSTM) -k triton $(ARGS)

test-triton-rest: $(VENV)/.built
	TRITON_INTERPRET=1 FASTSEQ_BACKEND=triton $(BIN)/python -m pytest tests/nn/test_kernels.py $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops tests/kernels -k "triton or kernels" \
	  $(addprefix --ignore=,$(INTERPRETED_LSTM)) $(ARGS)

# every kernel for every GPU, without one: within the two budget.json, no warnings, no spills that are not listed
check-gpu: $(VENV)/.built
	$(BIN)/python -m tests.kernels.budget --check
	$(BIN)/python -m tests.cuda.budget --check

# twenty steps under Lightning, transformers and Accelerate, which are large and have no part in make test
check-trainers: $(VENV)/.trainers
	$(BIN)/python -m pytest tests/trainers $(ARGS)

budget: $(VENV)/.built
	$(BIN)/python -m tests.kernels.budget
	$(BIN)/python -m tests.cuda.budget

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run $(or $(ARGS),lstm)

# ten minutes on a machine with a GPU, with the torch and Triton of $(PYTHON): no .venv, nothing is downloaded; the
# kernels for CUDA are those of fastseq/_cuda.abi3.so and _build.json, or built for that GPU where nvcc is
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu $(ARGS)

# every break of csrc/cuda is caught by the test that it names
check-breaks: $(VENV)/.built
	$(BIN)/python -m pytest -m nightly tests/cuda $(ARGS)

# what takes too long for every change; each target alone says what it needs
nightly: check-wheel check-arm check-trainers check-breaks docs

# a manylinux wheel of both doors, and the source distribution. The libraries of torch, libgomp among them, are not
# copied in: a second one in the process would be another pool of threads
wheel: $(VENV)/.built $(VENV)/.wheel
	rm -rf dist/plain dist/*.whl dist/*.tar.gz
	FASTSEQ_BUILD_TEST_ISA=0 $(BIN)/python -m build --no-isolation --sdist --wheel --outdir dist/plain
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libgomp.so.*' \
	  --wheel-dir dist dist/plain/*.whl
	mv dist/plain/*.tar.gz dist
	rm -r dist/plain

# the wheel in empty environments, with torch and without, where there is no compiler and none of these files
check-wheel: wheel
	$(MAKE) --no-print-directory hub
	TORCH='$(TORCH)' $(BIN)/python -m pytest -m nightly tests/wheel $(ARGS)

# what the Hugging Face Hub expects of a repository of kernels, in dist/hub
hub: $(VENV)/.built $(VENV)/.wheel
	$(BIN)/python .ci/hub.py dist/hub

# 64-bit ARM in an emulator: core, numpy door and C interface. Needs Debian or Ubuntu with g++-aarch64-linux-gnu, qemu-user
check-arm: $(VENV)/.built
	$(BIN)/python -m pytest -m nightly tests/arm $(ARGS)

# the documentation, into build/docs, and its notebook run; blocks, tables and messages are tested by make test. All
# pages anew: Sphinx does not see where a docstring changed
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going --quiet --fresh-env --write-all docs build/docs
	$(BIN)/python -m pytest -m 'nightly or not nightly' tests/test_docs.py -k "notebook or pages_of_names" $(ARGS)

check: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

clean:
	rm -rf build dist *.egg-info fastseq/*.so fastseq/_build.json $(VENV)/.built $(EXTRAS)

$(VENV)/.built: $(TOOLS) $(SOURCES)
	@echo "compiling fastseq, a minute or two"
	$(PIP) install --quiet --no-build-isolation --editable '.[demo,dev]'
	$(BIN)/fastseq info
	@touch $@

$(EXTRAS): $(VENV)/.%: $(VENV)/.built
	$(PIP) install --quiet --no-build-isolation --editable '.[$*]'
	@touch $@

# real weights for a test; the package's own dependencies are not needed
$(VENV)/.pretrained: $(TOOLS)
	$(PIP) install --quiet --no-deps 'silero-vad>=6.2'
	@touch $@

$(TOOLS):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastseq needs Python >= 3.10, '$(PYTHON)' is not: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	  { echo "fastseq needs the C headers of '$(PYTHON)' (Debian, Ubuntu: apt install python3-dev)" >&2; exit 1; }
	@compiler=$${CXX:-$$($(PYTHON) -c 'import sysconfig as s; print(s.get_config_var("CXX"))')}; \
	$$compiler --version >/dev/null 2>&1 || \
	  { echo "fastseq needs a C++20 compiler, '$$compiler' is not there (Debian, Ubuntu: apt install g++)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' fails (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PIP) install 'setuptools>=77' 'pybind11>=2.13' $(TORCH)
	@rm -f $(VENV)/.tools-* && touch $@
