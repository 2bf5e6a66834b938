# Each target does all its own set-up in .venv: `make demo` and `make test` work on a fresh machine with Python 3.11.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
CORE := .venv-core
CORE_TORCH := 2.13.0
CORE_TESTS := tests/pyramidclip_hf --ignore tests/pyramidclip_hf/vinvl tests/test_core_environment.py
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup demo test test-main test-core test-app test-ray test-all test-ranks test-faults test-kernels test-upstream bench gpu gpu-wheels test-versions lint clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(VENV)/installed  ## build .venv with the tested versions of everything

# The stamp is newer than what decides its content, so a changed version is installed by the next command.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed  ## build the emoji scenes, train, evaluate, reload, write runs/demo/report.html
	$(BIN)/python -m training.demo

test: test-main test-core  ## the tests, with all extras and with the core dependencies only

test-main: $(VENV)/installed
	$(PYTEST) -n $(WORKERS) -m "not slow" --durations=15

test-core: $(CORE)/installed
	rm -rf build
	$(CORE)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall .
	$(CORE)/bin/pytest -n $(WORKERS) -m "not slow" $(CORE_TESTS)

# The same versions but for torch, and no extras. The tests import the installed package, not the checkout's.
$(CORE)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(CORE)
	grep -vE '^torch(vision)?==' constraints.txt > $(CORE)/constraints.txt
	$(CORE)/bin/python -m pip install --disable-pip-version-check --constraint $(CORE)/constraints.txt \
		torch==$(CORE_TORCH) pytest pytest-timeout pytest-xdist .
	touch $@

test-all: $(VENV)/installed  ## every test, the long ones too
	$(PYTEST) -n $(WORKERS)
	$(MAKE) test-core test-app test-ray test-versions

APP := .venv-app
APP_TESTS := $(wildcard tests/pyramidclip_hf/test_app*.py) tests/training/test_static_page.py
NPM_PACKAGES := onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0
test-app: $(APP)/installed  ## the page of `pyramidclip app`, and the static one, in a browser: wants npm, and Debian's chromium or Chrome
	$(APP)/bin/python -m pytest $(APP_TESTS)

# The tested versions but for what constraints-app.txt has.
$(APP)/installed: setup.cfg pyproject.toml constraints.txt constraints-app.txt
	$(PYTHON) -m venv --clear $(APP)
	{ grep -v '^pillow==' constraints.txt; cat constraints-app.txt; } > $(APP)/constraints.txt
	$(APP)/bin/python -m pip install --disable-pip-version-check --constraint $(APP)/constraints.txt \
		--editable ".[app,export]" accelerate playwright pytest pytest-timeout pytest-xdist
	npm install --no-fund --no-audit --prefix $(APP) $(NPM_PACKAGES)
	touch $@

# Without an environment of its own, as nothing that is installed changes.
test-ray: $(VENV)/installed  ## --engine ray, on a cluster of two workers on this machine
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[ray]"
	$(PYTEST) tests/training/prepare/steps/test_ray.py

test-faults: $(VENV)/installed  ## runs killed at each file operation, on a full disk, with damaged files; hostile bytes; the launcher
	$(PYTEST) -n $(WORKERS) tests/faults tests/test_fuzz.py tests/training/data/test_faults.py \
		tests/training/loop/test_resume.py tests/training/prepare/steps/test_work.py tests/training/test_launched.py

RANKS_TESTS := $(addprefix tests/training/test_,machines.py launched.py slurm.py) \
	$(addprefix tests/training/data/test_,machine.py start_up.py) \
	$(addprefix tests/training/loop/test_,agreement.py nodes.py pace.py processes.py watch.py)
test-ranks: $(VENV)/installed  ## faults of several processes: signals, a stopped, dead or disagreeing one, other machines, slurm.sh
	$(PYTEST) -n $(WORKERS) $(RANKS_TESTS)

# A capability that the processor lacks ends the process, so the highest is forced only where it is there: without the
# bf16 instructions, which the plain tests have where they exist.
KERNEL_TESTS := $(PYTEST) -n $(WORKERS) -m "not slow"
test-kernels: $(VENV)/installed  ## the tests with the arithmetic of each kind of processor, and with two threads
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(KERNEL_TESTS)
	ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(KERNEL_TESTS)
	if grep -qsw avx512bw /proc/cpuinfo; then \
		ATEN_CPU_CAPABILITY=avx512 MKL_CBWR=AVX512 ONEDNN_MAX_CPU_ISA=AVX512_CORE $(KERNEL_TESTS); fi
	OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 $(KERNEL_TESTS)

# What a machine with a GPU lacks: pure Python.
GPU_WHEELS := ftfy wcwidth open_clip_torch webdataset braceexpand

# The core with the oldest versions that setup.cfg allows, with what lies on a machine with a GPU, and with the newest;
# and what Accelerate makes of its files. The middle one has no more than docs/gpu.md asks for and `make gpu-wheels`
# fetches, and passes `make gpu` at toy size.
VERSIONS := oldest middle newest
VERSIONS_TESTS := tests/pyramidclip_hf tests/test_accelerate_files.py --ignore tests/pyramidclip_hf/vinvl
.venv-oldest/passed: PACKAGES := torch==2.6.0 torchvision==0.21.0 transformers==5.11.0 numpy==2.0.0 pillow==11.0.0 \
	ftfy==6.3.0 accelerate==1.10.0
.venv-middle/passed: PACKAGES := torch==2.11.0 torchvision==0.26.0 transformers==5.17.0 accelerate==1.15.0 pyarrow \
	pyyaml tensorboard matplotlib scikit-learn timm xxhash $(GPU_WHEELS)
.venv-newest/passed: PACKAGES := torch torchvision transformers huggingface_hub numpy pillow accelerate torchao
.venv-middle/passed: MORE_TESTS := tests/gpu
# Other Pythons too, where they are installed.
.venv-middle/passed: PYTHON := $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || echo $(PYTHON))
.venv-newest/passed: PYTHON := $(shell for one in 3.14 3.13; do python$$one -c '' 2>/dev/null && echo python$$one && exit; done; echo $(PYTHON))

test-versions: $(VERSIONS:%=.venv-%/passed)  ## the core's tests with the oldest, middle and newest versions of what it needs

.venv-%/passed: setup.cfg pyproject.toml Makefile $(wildcard pyramidclip_hf/*.py)
	[ -x .venv-$*/bin/python ] || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet $(PACKAGES) pytest pytest-timeout pytest-xdist .
	.venv-$*/bin/pytest -n $(WORKERS) -m "not slow and not loopback" $(VERSIONS_TESTS) $(MORE_TESTS)
	touch $@

test-upstream: $(VENV)/installed  ## transformers' own common tests against these classes (downloads its source distribution once)
	$(BIN)/python -m tests.upstream

bench: $(VENV)/installed  ## measure every row of the speed table, side by side
	$(BIN)/python -m tests.bench

# A bare machine with a GPU and its own torch needs no .venv: what is missing there lies in wheels/.
gpu:  ## what only a GPU can show: right, then fast, in 8 minutes (without one: a dry pass); ARGS="--parts right"
	@if [ -x $(BIN)/python ]; then python=$(BIN)/python; \
	elif $(PYTHON) -c 'import sys, torch, transformers; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) setup && python=$(BIN)/python; fi && $$python -m tests.gpu $(ARGS)

gpu-wheels:  ## fetch the pure-Python wheels that a bare machine with a GPU lacks into wheels/
	$(PYTHON) -m pip download --disable-pip-version-check --no-deps --only-binary :all: --constraint constraints.txt \
		--dest wheels $(GPU_WHEELS)

lint: $(VENV)/installed  ## ruff, its format check, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environments and what the tools cached
	rm -rf $(VENV) $(CORE) $(APP) $(VERSIONS:%=.venv-%) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .cache
