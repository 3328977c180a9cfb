# make demo, make test: each makes a virtual environment if there is none, installs with pinned versions, and runs.
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -q
GPU_FLAGS ?=

CORES := $(shell getconf _NPROCESSORS_ONLN)
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test test-rest test-all test-models bench gpu resources cuda-resources model docs lint types wheel sanitize aarch64 clean

help:
	@echo "make demo      train and compare on real input (3 minutes); results in demo_output/"
	@echo "make test      every op on every backend, the module's contract (5 minutes on two cores)"
	@echo "make test-all  that and the rest: every case on the stand-ins for a GPU, benchmarks, installation, pages (32 minutes)"
	@echo "make test-models  the models in timm and transformers, and the recipes, in .venv-models with the newest torch"
	@echo "make bench     the side-by-side benchmark table; results in benchmarks/results/"
	@echo "make gpu       on a machine with a GPU: tests on real kernels, benchmarks, profiles, sanitizer (no installation)"
	@echo "make resources compile every Triton kernel for GPUs that are not there; the table in benchmarks/results/"
	@echo "make cuda-resources  compile every CUDA kernel with nvcc for GPUs that are not there; the table in benchmarks/results/"
	@echo "make model     what attention has to cost on a GPU, and what the compiled kernels should take there"
	@echo "make docs      the guides and the API as a site, in site/"
	@echo "make lint      ruff, import layers, clang-format, workflows"
	@echo "make types     mypy on the package"
	@echo "make wheel     an sdist and a manylinux wheel in dist/, checked and tried in an empty environment"
	@echo "make sanitize  the C++ tests under AddressSanitizer and UBSan"
	@echo "make aarch64   the C++ tests compiled for Arm, run by an emulator (apt: g++-aarch64-linux-gnu qemu-user)"
	@echo "make clean     remove what was built and installed"
	@echo "PYTHON=python3.12 picks the interpreter, VENV=dir the environment, PYTEST_FLAGS='-x -k name' what pytest gets"
	@echo "GPU_FLAGS='--only canary --only headline' picks steps of make gpu"

demo: $(VENV)/.installed
	$(RUN) -m demo

# A process a core, with one thread each: what runs on stand-ins for a GPU is Python.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_FLAGS) -n auto --dist worksteal

test: $(VENV)/.installed
	$(RUN) -m setformer_kernels info
	$(PYTEST) -m "not exhaustive"

test-rest: $(VENV)/.installed
	$(PYTEST) -m exhaustive

test-all: test test-rest

# Another environment: torchvision and timm need the torch that they were built for, the newest.
test-models: .venv-models/.installed
	OMP_NUM_THREADS=1 .venv-models/bin/python -m pytest $(PYTEST_FLAGS) -n auto --dist worksteal tests/models

bench: $(VENV)/.installed
	$(RUN) -m benchmarks

# Neither environment nor network: the interpreter that has a torch with CUDA, from the source tree.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_FLAGS)

resources: $(VENV)/.installed
	$(RUN) -m benchmarks.compiled.resources

cuda-resources: $(VENV)/.installed
	$(RUN) -m benchmarks.compiled.cuda_resources
	$(RUN) -m benchmarks.compiled.cuda_instructions

model: $(VENV)/.installed
	$(RUN) -m benchmarks.compiled.model --resident

docs: $(VENV)/.docs
	$(VENV)/bin/mkdocs build --strict --clean

lint: $(VENV)/.lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/zizmor --offline --quiet .github/workflows

types: $(VENV)/.installed $(VENV)/.lint
	$(RUN) -m mypy

# An sdist and a wheel in dist/, checked, installed into an empty environment and run there.
wheel:
	PYTHON=$(PYTHON) .ci/wheel

sanitize:
	$(MAKE) -C csrc -j$(CORES) sanitize cuda-sanitize

aarch64:
	$(MAKE) -C csrc -j$(CORES) aarch64

clean:
	rm -rf $(VENV)/.installed $(VENV)/.lint $(VENV)/.docs .venv-models/.installed build dist site demo_output *.egg-info setformer_kernels/_C*.so

$(VENV)/.venv-ready: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --disable-pip-version-check -c constraints.txt pip
	@touch $@

# The Python sources are installed in place (editable), so only these inputs ask for a new build of the extension.
$(VENV)/.installed: $(VENV)/.venv-ready pyproject.toml $(wildcard setup.py) $(CSRC)
	$(PIP) install -c constraints.txt --build-constraint constraints.txt -e '.[demo,test,bench,triton]'
	@touch $@

.venv-models/.installed: constraints-models.txt pyproject.toml $(wildcard setup.py) $(CSRC)
	test -x .venv-models/bin/python || $(PYTHON) -m venv .venv-models
	.venv-models/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip
	.venv-models/bin/python -m pip install --quiet -c constraints-models.txt --build-constraint constraints.txt \
		-e '.[timm,transformers,recipes,onnx,test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.venv-ready pyproject.toml
	$(PIP) install --quiet -c constraints.txt --group lint
	@touch $@

$(VENV)/.docs: $(VENV)/.venv-ready pyproject.toml
	$(PIP) install --quiet -c constraints.txt --group docs
	@touch $@
