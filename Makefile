# Every target sets up .venv if it needs it, and does only what changed. A machine needs Python with
# its headers and venv module, a C++ compiler, make and git. The rest comes from the package index.
#
#   make            build into the checkout
#   make check      tests for the editing loop: CPU kernels, ops and layer, in under two minutes
#   make test       native tests (also of the CUDA kernels, in an emulator), then pytest, without
#                   slow tests
#   make bench      the quick benchmark suite, also on the GPU if there is one
#   make demo       RoSA on SmolLM2-135M and generated data: minutes on a CPU, into build/demo
#   make lint       ruff, mypy, clang-format (`make format` fixes what they can fix)
#   make sanitize   native tests under ASan + UBSan, then under TSan
#   make mutants    plants faults into the CUDA kernels; the emulator must find each of them
#   make cuda-all   CUDA kernels for every architecture, and a report of their machine code
#   make gpu        on a GPU machine without an index: checks, measurements, in BUDGET=5 minutes
#   make gpu-more   GPU tests, memcheck and the remaining measurements, in BUDGET=4 minutes
#   make clean      remove all that make created
#
# If nvcc is found, CUDA kernels are built for the GPU of the machine. If the machine has an NVIDIA
# GPU but no nvcc, nvcc is installed from the index into .venv (105 MB). To leave them out, use
#   make test CMAKE_ARGS=-DROSA_CUDA=OFF
#
# On Linux, torch from the default index brings gigabytes of CUDA. CPU-only machines avoid them with
#   make test TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX_URL ?=
PIP_EXTRA ?=
PRESET ?= release
CMAKE_ARGS ?=
CTEST_ARGS ?= --label-exclude slow
MUTANTS_ARGS ?=
PYTEST_ARGS ?= -q -m "not slow"
DEMO_ARGS ?=
BENCH_ARGS ?= run --suite quick --device auto --out build/bench
BUDGET ?=
GPU_ARGS ?=

EXTRAS := bench dev train
READY := .venv/ready
BUILD := build/$(PRESET)
CTEST_FLAGS := --output-on-failure --no-tests=error --parallel 4

# The same as activating the environment: tools, and the Python that CMake finds, come from .venv.
export VIRTUAL_ENV := $(CURDIR)/.venv
export PATH := $(VIRTUAL_ENV)/bin:$(PATH)

.DEFAULT_GOAL := build
.PHONY: check test build bench demo lint format sanitize asan tsan mutants cuda-all gpu gpu-more \
  clean FORCE
.DELETE_ON_ERROR:

# Leaves out emulated kernels and torch.compile. Of the instruction sets, it tests only the one that
# users get.
check: build
	ctest --test-dir $(BUILD) $(CTEST_FLAGS) --label-exclude 'simt|cuda|install'
	python -m pytest -q -m "not (slow or emulated or compiled or gpu or other_isa)" \
	  -k "not (reference-cpu or dense-cpu)" tests/ops tests/nn tests/test_layering.py

test: build
	ctest --test-dir $(BUILD) $(CTEST_FLAGS) $(CTEST_ARGS)
	python -m pytest $(PYTEST_ARGS)

# CMake places the module into rosa_kernels/ and the environment points at the checkout. Machines
# without an index use the same build, and an edit costs only what ninja rebuilds. An editable
# install would have an import hook that compiles during a benchmark.
build: $(BUILD)/build.ninja
	cmake --build $(BUILD)

bench: build
	python -m bench $(BENCH_ARGS)

demo: build
	python -m rosa_train demo $(DEMO_ARGS)

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CPP_FILES)

format: $(READY)
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FILES)

# These run one after the other, even with -j, because each takes all cores.
sanitize: asan
	$(MAKE) tsan

asan tsan: %: build/%/build.ninja
	cmake --build build/$@
	ctest --test-dir build/$@ $(CTEST_FLAGS) $(CTEST_ARGS)

mutants: $(READY)
	python cpp/tests/simt/mutants.py $(MUTANTS_ARGS)

cuda-all: build/cuda-all/build.ninja
	cmake --build build/cuda-all --target rosa_cuda
	python cpp/tools/resource_report.py build/cuda-all/cpp/src/cuda/librosa_cuda.a

# These do not use .venv, because it cannot be made on machines without a package index.
gpu:
	$(PYTHON) cpp/tools/gpu.py first $(if $(BUDGET),--budget $(BUDGET)) $(GPU_ARGS)

gpu-more:
	$(PYTHON) cpp/tools/gpu.py more $(if $(BUDGET),--budget $(BUDGET)) $(GPU_ARGS)

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f rosa_kernels/_C.*.so tests/_simt.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

CPP_FILES = $(shell find cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

INSTALL_NVCC = $(if $(findstring ROSA_CUDA=OFF,$(CMAKE_ARGS)),,--install)
# CMAKE_ARGS configure again. CMake keeps them in build/%.
build/%/build.ninja: $(READY) CMakePresets.json $(if $(CMAKE_ARGS),FORCE)
	CUDACXX="$$(python cpp/tools/cuda_toolchain.py $(INSTALL_NVCC))" cmake --preset $* $(CMAKE_ARGS)
	@touch $@

# Names missing tools before minutes are spent on downloads. $(call need,test,what is missing)
need = @{ $(1); } >/dev/null 2>&1 || { echo "make: $(2)" >&2; exit 1; }
INCLUDE_DIR = $$($(PYTHON) -c "import sysconfig; print(sysconfig.get_path('include'))")
# pip's own `--group` and `.[extra]` would need a newer pip or a build of this package.
REQUIREMENTS = import sys, tomllib; \
  p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  extras = p["optional-dependencies"]; \
  print(*p["dependencies"], *(r for e in sys.argv[1:] for r in extras[e]), sep="\n")

$(READY): pyproject.toml constraints.txt
	$(call need,command -v $(PYTHON),$(PYTHON) was not found: apt install python3 (Debian))
	$(call need,$(PYTHON) -c "assert __import__('sys').version_info >= (3$(comma) 11)",\
	  $(PYTHON) is older than 3.11: choose another with PYTHON=)
	$(call need,$(PYTHON) -c "import ensurepip$(comma) venv",\
	  $(PYTHON) has no venv module: apt install python3-venv (Debian))
	$(call need,test -f $(INCLUDE_DIR)/Python.h,\
	  $(PYTHON) has no headers (Python.h): apt install python3-dev (Debian))
	$(call need,command -v $${CXX:-c++} || command -v g++ || command -v clang++,\
	  no C++ compiler was found: apt install g++ (Debian))
	$(PYTHON) -m venv .venv
	.venv/bin/python -c '$(REQUIREMENTS)' $(EXTRAS) > .venv/requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --requirement .venv/requirements.txt \
	  $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) $(PIP_EXTRA)
	.venv/bin/python -c "import sysconfig; \
	  open(sysconfig.get_path('purelib') + '/rosa_kernels.pth', 'w').write('$(CURDIR)\n')"
	@touch $@
comma := ,
