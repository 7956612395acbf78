# make demo: a whole training run of the toy model on a CPU, from nothing but Python >= 3.11, a C++ compiler and make,
# and its true scores before and after.
PYTHON ?= python3
VENV ?= .venv
TORCH := $(shell grep '^torch==' constraints.txt)
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test bench lint clean

demo: $(READY)
	rm -rf runs/demo
	$(RUN) -m spo_fast.train --model toy --output_dir runs/demo
	$(RUN) -m spo_fast.toy.evaluate runs/demo

test: $(READY)
	$(RUN) -m pytest
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/test_transition.py tests/test_preference_loss.py \
		tests/test_resize_normalize.py tests/test_lora_linear.py tests/test_merge_lora.py \
		tests/test_group_norm_silu.py tests/test_geglu.py
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/test_golden.py -k 'ddim or loss'

bench: $(READY)
	$(RUN) -m pytest benchmarks/

lint: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# torch first and by itself, pinned: asked for as a range, pip may settle on another build of it, gigabytes larger.
$(READY): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install -c constraints.txt $(TORCH)
	$(RUN) -m pip install -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf build dist spo_fast/lib *.egg-info
