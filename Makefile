# make demo: a whole training run of the toy model on a CPU, from nothing but Python >= 3.11, a C++ compiler and make,
# and its true scores before and after.
PYTHON ?= python3
VENV ?= .venv
TORCH := $(shell grep '^torch==' constraints.txt)
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# one process a core and one thread a process: two threads each would stand in each other's way
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses=4 --dist loadfile
# the lowest versions that pyproject.toml allows, and the tests that are chosen to run beside them
LOWEST ?= .venv-lowest
LOWEST_TESTS ?= tests/test_toy.py tests/test_foreign_models.py tests/test_foreign_loras.py tests/test_foreign_schedules.py \
	tests/test_export.py tests/test_text.py tests/test_quantised.py tests/test_fuse.py

# PyTorch's CUDA build with stubs for a GPU: .venv-nullgpu/bin/python -m benchmarks.nullgpu.rows --help. Needs CUDA's headers.
NULLGPU ?= .venv-nullgpu
NULLGPU_PYTHON ?= python3.12
NULLGPU_STUBS := $(wildcard benchmarks/nullgpu/stubs/* benchmarks/nullgpu/stubs/libraries/*)

.PHONY: demo test test-lowest bench lint nullgpu clean

demo: $(READY)
	rm -rf runs/demo
	$(RUN) -m spo_fast.train --model toy --output_dir runs/demo
	$(RUN) -m spo_fast.toy.evaluate runs/demo

test: $(READY)
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/test_transition.py tests/test_preference_loss.py \
		tests/test_resize_normalize.py tests/test_lora_linear.py tests/test_merge_lora.py \
		tests/test_group_norm_silu.py tests/test_geglu.py tests/test_ada_norm.py \
		tests/test_gelu_tanh.py tests/test_joint_heads.py
	TRITON_INTERPRET=1 $(PYTEST) tests/test_golden.py -k 'ddim or loss'

# the C library is built by then: the package is taken from here
test-lowest: $(LOWEST)/.ready $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(LOWEST)/bin/python -m pytest -n auto --maxprocesses=4 --dist loadfile $(LOWEST_TESTS)

bench: $(READY)
	$(RUN) -m pytest benchmarks/

lint: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

nullgpu: $(NULLGPU)/.ready

$(NULLGPU)/.ready: benchmarks/nullgpu/requirements.txt benchmarks/nullgpu/build.py $(NULLGPU_STUBS)
	@$(NULLGPU_PYTHON) -c "import sys; assert sys.version_info[:2] == (3, 12)" 2> /dev/null || \
		{ echo "nullgpu: no Python 3.12. Name one: make nullgpu NULLGPU_PYTHON=/path/to/python3.12"; exit 1; }
	@$(NULLGPU_PYTHON) benchmarks/nullgpu/build.py check
	test -x $(NULLGPU)/bin/python || $(NULLGPU_PYTHON) -m venv $(NULLGPU)
	$(NULLGPU)/bin/python -m pip install --quiet --no-deps -r benchmarks/nullgpu/requirements.txt
	$(NULLGPU_PYTHON) benchmarks/nullgpu/build.py $(NULLGPU)/bin/python $(NULLGPU)/nullgpu
	touch $@

# torch first and by itself, pinned: asked for as a range, pip may settle on another build of it, gigabytes larger.
$(READY): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install -c constraints.txt $(TORCH)
	$(RUN) -m pip install -c constraints.txt -e '.[test]'
	touch $@

$(LOWEST)/.ready: pyproject.toml tests/lowest.py constraints.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install -c constraints.txt $(TORCH)
	$(LOWEST)/bin/python -m pip install $$($(LOWEST)/bin/python tests/lowest.py)
	touch $@

clean:
	rm -rf build dist spo_fast/lib *.egg-info
