# Every target but gpu sets up what it needs. Variables: PYTHON (3.10 or later), DEMO_ARGS, TEST_ARGS, BENCH_ARGS;
# for gpu, GPU_PYTHON (an interpreter that has torch and triton) and GPU_ARGS (bench/gpu.sh --help).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
OLDEST := build/oldest
PIP := $(BIN)/python -m pip install -qq

GPU_PYTHON ?= python3
OUTER_PATH := $(PATH)

# torch looks for ninja on PATH only
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-oldest bench gpu lint format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	@echo "Installing torch and the development packages into $(VENV): minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@# torch first and alone: nothing installed later may bring in a second one
	@$(PIP) -c constraints.txt torch setuptools
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@# Not in constraints.txt: a GPU build of torch requires another version, and that one has to stay
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) 'triton==3.6.0; sys_platform == "linux"'
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest $(TEST_ARGS)

# The oldest transformers that pyproject.toml allows, laid over the environment's own
test-oldest: $(OLDEST)/ready
	PYTHONPATH=$(abspath $(OLDEST)) $(BIN)/python -m pytest tests/test_hf*.py $(TEST_ARGS)

$(OLDEST)/ready: $(READY)
	@rm -rf $(OLDEST)
	@# --no-deps: torch and numpy stay the environment's; from requests on, what its newer huggingface_hub does without
	@$(PIP) --target $(OLDEST) --no-deps transformers==4.48.0 tokenizers==0.21.4 huggingface_hub==0.36.2 \
	  requests==2.34.2 urllib3==2.8.0 certifi==2026.10.18 charset-normalizer==3.5.2
	@touch $@

bench: setup
	$(BIN)/python -m bench.cpu $(BENCH_ARGS)

# A GPU machine brings its own build of torch, so not in $(VENV)
gpu: export PATH := $(OUTER_PATH)
gpu:
	PYTHON=$(GPU_PYTHON) bench/gpu.sh $(GPU_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keeps $(VENV): it takes minutes to make
clean:
	rm -rf build dist demo-output *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
