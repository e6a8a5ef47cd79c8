# Every target but gpu sets up what it needs. Variables: PYTHON (3.10 or later), DEMO_, TEST_, BENCH_ and VERIFY_ARGS;
# for gpu, GPU_PYTHON (an interpreter that has torch and triton) and GPU_ARGS (bench/gpu.sh --help); for the extension
# DEBERTA_FAST_CPU (0 does without it, 1, the default here, fails where it cannot be built), DEBERTA_FAST_CUDA (the same
# for its CUDA kernels; by default they are built if there is an nvcc) and those of setup.py; for sanitize, which needs
# GCC, SANITIZE_ARGS (what pytest runs).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
OLDEST := build/oldest
VERIFIER := build/verifier
# The name matters: dill, which datasets uses, pickles packages whole that lie in a folder with another
CLIENTS := build/clients/site-packages
PIP := $(BIN)/python -m pip install -qq

export DEBERTA_FAST_CPU ?= 1
BUILT := build/extension-cpu$(DEBERTA_FAST_CPU)-cuda$(DEBERTA_FAST_CUDA)
CSRC := $(wildcard $(addprefix csrc/,*.cpp *.h cpu/*.cpp cpu/*.h cpu/tiles/*.cpp cpu/tiles/*.h cuda/*.cu cuda/*.cpp cuda/*.h))
FORMATTED := $(CSRC) $(wildcard $(addprefix tests/,op/*.cpp emulator/*.cpp emulator/*.cu emulator/*.h))
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined
SANITIZE_ARGS ?= tests/op/test_cpu.py tests/op/test_cpu_calls.py

# A worker for every processor, up to four, takes one file of tests after the other, in the order of tests/conftest.py.
# For none: TEST_ARGS="-n 0"
WORKERS := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

GPU_PYTHON ?= python3
OUTER_PATH := $(PATH)

# torch looks for ninja on PATH only
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo pretrain-demo test test-oldest test-clients sanitize verify-ptx bench gpu lint format clean

setup: $(BUILT)

$(READY): pyproject.toml constraints.txt Makefile
	@echo "Installing torch and the development packages into $(VENV): minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@# torch first and alone: nothing installed later may bring in a second one
	@$(PIP) -c constraints.txt torch setuptools
	@# Without the extension, which is the next rule's
	@DEBERTA_FAST_CPU=0 DEBERTA_FAST_CUDA=0 $(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@# Not in constraints.txt: a GPU build of torch requires another version, and that one has to stay
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) 'triton==3.6.0; sys_platform == "linux"'
	@touch $@

# setup.py compiles what changed. One GPU architecture is enough here: others compile its PTX when it is first used
$(BUILT): $(READY) setup.py $(CSRC)
	@TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0+PTX}" $(BIN)/python setup.py -q build_ext --inplace
	@mkdir -p $(@D) && rm -f build/extension-* && touch $@

demo: setup
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# Ten minutes on two cores. It downloads labelled text into build/vader
pretrain-demo: setup
	$(BIN)/python examples/pretrain_demo.py $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest $(WORKERS) $(TEST_ARGS)

# The oldest transformers that pyproject.toml allows, laid over the environment's own
test-oldest: $(OLDEST)/ready $(BUILT)
	PYTHONPATH=$(abspath $(OLDEST)) $(BIN)/python -m pytest $(WORKERS) $(wildcard tests/*/test_hf*.py) $(TEST_ARGS)

$(OLDEST)/ready: $(READY)
	@rm -rf $(OLDEST)
	@# --no-deps: torch and numpy stay the environment's; from requests on, what its newer huggingface_hub does without
	@$(PIP) --target $(OLDEST) --no-deps transformers==4.48.0 tokenizers==0.21.4 huggingface_hub==0.36.2 \
	  requests==2.34.2 urllib3==2.8.0 certifi==2026.10.18 charset-normalizer==3.5.2
	@touch $@

# The packages that DeBERTa is used through (docs/clients.md), laid over the environment's own
test-clients: $(CLIENTS)/ready $(BUILT)
	PYTHONPATH=$(abspath $(CLIENTS)) $(BIN)/python -m pytest $(WORKERS) tests/clients $(TEST_ARGS)

# --no-deps: torch and numpy stay the environment's; pip check tells whether all the others fit
$(CLIENTS)/ready: $(READY) constraints-clients.txt
	@rm -rf $(CLIENTS)
	@$(PIP) --target $(CLIENTS) --no-deps -r constraints-clients.txt
	@PYTHONPATH=$(abspath $(CLIENTS)) $(BIN)/python -m pip check
	@touch $@

# The package with another build of the extension lies in $(SANITIZED). Preloaded: Python itself is not instrumented, and
# ASan has to find libstdc++ before torch throws. Leaks: Python leaves memory to its end
sanitize: $(READY)
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -R deberta_fast $(SANITIZED)
	@CXXFLAGS="-O1 -g -fno-omit-frame-pointer $(SANITIZERS) -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS" \
	  LDFLAGS="$(SANITIZERS)" CXX="$(CXX)" DEBERTA_FAST_CPU=1 DEBERTA_FAST_CUDA=0 \
	  $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) libstdc++.so.6" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(abspath $(SANITIZED)) $(BIN)/pytest --capture=sys $(SANITIZE_ARGS)

# Needs nvcc. VERIFY_ARGS="--mutants" leaves out one barrier after the other, which takes hours
verify-ptx: $(VERIFIER)/ready
	PYTHONPATH=$(abspath $(VERIFIER)) $(BIN)/python -m bench.verify_ptx $(VERIFY_ARGS)

$(VERIFIER)/ready: $(READY)
	@rm -rf $(VERIFIER)
	@$(PIP) --target $(VERIFIER) --no-deps sentryward==0.1.1
	@touch $@

bench: setup
	$(BIN)/python -m bench.cpu $(BENCH_ARGS)
	$(BIN)/python -m bench.operator_cpu $(BENCH_ARGS)
	$(BIN)/python -m bench.host $(filter --quick,$(BENCH_ARGS))
	$(BIN)/python -m bench.encoder $(BENCH_ARGS)

# A GPU machine brings its own build of torch, so not in $(VENV)
gpu: export PATH := $(OUTER_PATH)
gpu:
	PYTHON=$(GPU_PYTHON) bench/gpu.sh $(GPU_ARGS)

# Not the extension: what does not compile can be formatted
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy
	$(BIN)/mypy --strict tests/typed_use.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# Keeps $(VENV): it takes minutes to make
clean:
	rm -rf build dist deberta_fast/_C.*so demo-output pretrain-demo-output *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
