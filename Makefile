# pykvq: every task by name. `make` prints the list.
PYTHON ?= python3
VENV = .venv
BUILD = build
WERROR = -Werror

CFLAGS ?= -O3 -g
KVQ_CFLAGS = -std=c11 -D_GNU_SOURCE -fPIC -ffp-contract=off -fvisibility=hidden \
             -Wall -Wextra $(WERROR) -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Icore $(CFLAGS)
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
LIBS = -lm -lpthread -ldl

CORE = $(sort $(wildcard core/*.c core/kv/*.c core/isa/*.c core/cuda/*.c))
HEADERS = $(sort $(wildcard core/*.h core/*.def core/*/*.h core/*/*.def core/*/*.inl \
                   core/cuda/kernels/*.h tests/c/*.h))
TESTS_C = $(sort $(wildcard tests/c/*.c))
C_FILES = $(CORE) $(TESTS_C) $(filter %.h %.inl,$(HEADERS)) $(wildcard bench/*.c tests/fuzz/*.[ch])
CUDA_FILES = $(wildcard core/cuda/kernels/*.cu core/cuda/kernels/*.cuh \
               $(foreach d,tests/cuda tests/cuda/fake tests/cuda/sim,$d/*.[ch] $d/*.cpp $d/*.cu))
EXTENSION = pykvq/_native.abi3.so
PY = $(VENV)/bin/python

# A target X of the fuzzer is tests/fuzz/fuzz_X.c; it starts from the files in $(BUILD)/corpus/X.
FUZZ_TARGETS = gguf profile

.PHONY: help setup run test lib ext pull test-c test-arm64 test-py sanitize fuzz fuzz-libfuzzer lint format \
        $(FUZZ_TARGETS:%=fuzz-%) $(FUZZ_TARGETS:%=fuzz-libfuzzer-%) \
        bench-weights bench-kv quality speed speed-large speed-others fast-path accuracy gpu-check \
        tables plots clean
help: ## print this list
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

# ---- what users and CI call ---------------------------------------------------------------------

run: ext ## set up what running needs, fetch the default model (98 MB), and let it write under --kv skvq
	$(PY) -m pykvq run smollm2 --kv skvq --temp 0 -n 200 -p "Explain in one paragraph why the sky is blue."

test: lint test-c sanitize fuzz pull test-py test-cuda ## set everything up and run all tests

setup: $(VENV)/.ready-dev ## make the virtual environment with all that is needed for work on pykvq

# ---- environment --------------------------------------------------------------------------------

PYTHON_NEW = import sys; sys.exit(sys.version_info < (3, 10) and \
             sys.executable + " is Python %d.%d, expected 3.10 or later: name one, as in" \
             " make PYTHON=python3.12." % sys.version_info[:2])
# Debian splits Python: venv and the headers are packages of their own.
PYTHON_COMPLETE = import ensurepip, os, sysconfig; \
                  assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c '$(PYTHON_NEW)'
	@$(PYTHON) -c '$(PYTHON_COMPLETE)' 2>/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "$(PYTHON) lacks venv or its headers: installing python3-venv and python3-dev"; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv python3-dev; \
	else \
		echo "$(PYTHON) lacks venv or its headers; on Debian: sudo apt-get install python3-venv python3-dev"; \
		exit 1; \
	fi
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

$(EXTENSION): $(VENV)/.ready $(BUILD)/libkvq.a core/kvq.h pykvq/_build.py setup.py
	$(PY) -m pip install -q --disable-pip-version-check 'setuptools>=77'
	$(PY) setup.py -q build_ext --inplace
	@touch $@

ext: $(EXTENSION) ## build the Python extension in place

pull: ext # without it the tests on a real model are skipped, with that reason
	-$(PY) -m pykvq pull smollm2

# ---- the core -----------------------------------------------------------------------------------

$(BUILD)/%.o: %.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(KVQ_CFLAGS) -c $< -o $@

$(BUILD)/libkvq.a: $(CORE:%.c=$(BUILD)/%.o) $(BUILD)/core/cuda/images.o
	@rm -f $@
	$(AR) rcs $@ $^

lib: $(BUILD)/libkvq.a ## build the core as a static library

$(BUILD)/tests_c: $(TESTS_C) $(BUILD)/libkvq.a $(HEADERS)
	$(CC) $(KVQ_CFLAGS) $(TESTS_C) $(BUILD)/libkvq.a $(LIBS) -o $@

test-c: $(BUILD)/tests_c ## run the tests of the core on every instruction set that the processor has
	KVQ_ISA=avx512 $(BUILD)/tests_c
	KVQ_ISA=avx2 $(BUILD)/tests_c
	KVQ_ISA=ref $(BUILD)/tests_c

ARM64 = aarch64-linux-gnu-
QEMU_ARM64 = qemu-aarch64-static -cpu max

test-arm64: ## run the tests of the core on NEON, cross-compiled and under emulation (some minutes)
	@for tool in $(ARM64)gcc $(firstword $(QEMU_ARM64)); do command -v $$tool >/dev/null || { \
		echo "test-arm64 needs $$tool; on Debian:" \
			"sudo apt-get install gcc-aarch64-linux-gnu qemu-user-static"; exit 1; }; done
	$(MAKE) CC=$(ARM64)gcc AR=$(ARM64)ar BUILD=$(BUILD)/arm64 LIBS="-static $(LIBS)" \
		$(BUILD)/arm64/tests_c
	KVQ_ISA=neon $(QEMU_ARM64) $(BUILD)/arm64/tests_c
	KVQ_ISA=ref $(QEMU_ARM64) $(BUILD)/arm64/tests_c

$(BUILD)/tests_c_sanitized: $(TESTS_C) $(CORE) $(BUILD)/core/cuda/images.o $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(KVQ_CFLAGS) $(SANITIZE) $(TESTS_C) $(CORE) $(BUILD)/core/cuda/images.o $(LIBS) -o $@

sanitize: $(BUILD)/tests_c_sanitized ## run the tests of the core under ASan and UBSan
	$(BUILD)/tests_c_sanitized

include core/cuda/images.mk
include tests/cuda/cuda.mk

# ---- fuzzing ------------------------------------------------------------------------------------

FUZZ_READER_C = core/gguf.c core/gguf_part.c core/map.c core/error.c core/weights.c
FUZZ_gguf_C = tests/fuzz/fuzz_gguf.c $(FUZZ_READER_C) core/arch.c
FUZZ_profile_C = tests/fuzz/fuzz_profile.c $(FUZZ_READER_C) core/kv/kv_profile.c
fuzz-gguf: FUZZ_MUTATIONS ?= 200000
fuzz-profile: FUZZ_MUTATIONS ?= 100000
FUZZ_SECONDS ?= 30

$(BUILD)/corpus: tests/fuzz/make_corpus.py $(VENV)/.ready
	$(PY) $< $@

$(FUZZ_TARGETS:%=$(BUILD)/fuzz_%): $(BUILD)/fuzz_%: tests/fuzz/fuzz_%.c tests/fuzz/fuzz_main.c \
                                      tests/fuzz/fuzz.h $(CORE) $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(KVQ_CFLAGS) $(SANITIZE) tests/fuzz/fuzz_main.c $(FUZZ_$*_C) -o $@

fuzz: $(FUZZ_TARGETS:%=fuzz-%) ## open mutated files as models and as profiles, under sanitizers

$(FUZZ_TARGETS:%=fuzz-%): fuzz-%: $(BUILD)/fuzz_% $(BUILD)/corpus
	$< --mutate $(FUZZ_MUTATIONS) --seed 1 $(BUILD)/corpus/$*/*

fuzz-libfuzzer: $(FUZZ_TARGETS:%=fuzz-libfuzzer-%) ## the same with clang's libFuzzer, for FUZZ_SECONDS (30) each

$(FUZZ_TARGETS:%=fuzz-libfuzzer-%): fuzz-libfuzzer-%: tests/fuzz/fuzz_%.c $(BUILD)/corpus
	@mkdir -p $(BUILD)/fuzz_found/$*
	clang $(KVQ_CFLAGS) $(SANITIZE) -fsanitize=fuzzer $(FUZZ_$*_C) -o $(BUILD)/fuzz_$*_clang
	$(BUILD)/fuzz_$*_clang -max_total_time=$(FUZZ_SECONDS) -timeout=1 -max_len=16384 \
		$(BUILD)/fuzz_found/$* $(BUILD)/corpus/$*

# ---- Python, style, benchmarks ------------------------------------------------------------------

# Those that interpret PTX take minutes and need nvcc: `make cuda-ptx`, a part of test-cuda.
CUDA_PTX_TESTS = $(sort $(wildcard tests/test_ptx_*.py))

test-py: ext $(VENV)/.ready-dev ## run the tests of the package
	$(PY) -m pytest $(CUDA_PTX_TESTS:%=--ignore=%)

lint: $(VENV)/.ready-dev ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --strict tests/cuda/ptx
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES) $(CUDA_FILES)

format: $(VENV)/.ready-dev ## bring all sources into the project's style
	$(VENV)/bin/ruff check --fix -q .
	$(VENV)/bin/ruff format -q .
	$(VENV)/bin/clang-format -i $(C_FILES) $(CUDA_FILES)

$(BUILD)/bench_weights: bench/bench_weights.c $(BUILD)/libkvq.a
	$(CC) $(KVQ_CFLAGS) $< $(BUILD)/libkvq.a $(LIBS) -o $@

bench-weights: $(BUILD)/bench_weights ## time the weight products
	$(BUILD)/bench_weights

$(BUILD)/bench_kv: bench/bench_kv.c $(BUILD)/libkvq.a
	$(CC) $(KVQ_CFLAGS) $< $(BUILD)/libkvq.a $(LIBS) -o $@

bench-kv: $(BUILD)/bench_kv ext ## time scores, sums and encoding of every KV codec
	$(BUILD)/bench_kv
	$(PY) bench/kernels.py

quality: ext ## measure what each KV scheme costs, on both models (needs PYKVQ_DATA; hours; goes on where it was)
	$(PY) bench/quality.py smollm2 --tasks kl --chunks 16
	$(PY) bench/quality.py qwen2.5-coder-0.5b --tasks kl --chunks 16
	$(PY) bench/quality.py smollm2 --text frankenstein.txt --tasks kl --chunks 6
	$(PY) bench/quality.py qwen2.5-coder-0.5b --text frankenstein.txt --tasks kl --chunks 6
	$(PY) bench/quality.py smollm2 --text "$$($(PY) -c 'import _pydecimal; print(_pydecimal.__file__)')" \
		--tasks kl --chunks 6
	$(PY) bench/quality.py smollm2 --own-setting --tasks kl --chunks 16
	$(PY) bench/quality.py smollm2 --tasks needle,retrieval --trials 1
	$(PY) bench/quality.py qwen2.5-coder-0.5b --tasks needle,retrieval --trials 1

SPEED = --fill --kv skvq,auto,f16,q8_0 --peer-kv f16,q8_0 --repetitions 5 --prompt-depth 0

speed: ext ## measure speed by depth beside llama.cpp, on both models (needs llama-cpp-python; a quarter of an hour)
	$(PY) bench/speed.py smollm2 --depths 0,2048,8192 $(SPEED)
	$(PY) bench/speed.py qwen2.5-coder-0.5b --depths 0,8192,32768 $(SPEED)
	$(PY) bench/speed.py smollm2 --depths 0 --prompt 8192 --generate 0 --kv skvq --peer-kv f16 --repetitions 3

$(BUILD)/7b-shape.gguf: models/make_7b_shape.py $(VENV)/.ready
	@mkdir -p $(@D)
	$(PY) $< $@

speed-large: ext $(BUILD)/7b-shape.gguf ## the same with random weights in the shape of a 7B model (4.1 GB in build/)
	$(PY) bench/speed.py $(BUILD)/7b-shape.gguf --depths 0,8192,32768 --fill --kv skvq \
		--peer-kv f16,q8_0 --repetitions 5 --generate 4 --prompt 256 --prompt-depth 0
	$(PY) bench/speed.py $(BUILD)/7b-shape.gguf --alone --kv skvq --depths 0,1000000 --fill --prompt 0 \
		--generate 2 --repetitions 2

speed-others: ext ## measure steps beside a busy process and with many threads, and start-up
	$(PY) bench/contention.py smollm2
	$(PY) bench/startup.py smollm2

fast-path: ext ## measure how near the fast kernels are to the reference (needs PYKVQ_DATA; a quarter of an hour)
	$(PY) bench/fast_path.py smollm2
	$(PY) bench/fast_path.py qwen2.5-coder-0.5b

accuracy: ext ## measure how near the logits are to float32, ours and llama.cpp's (needs PYKVQ_DATA)
	$(PY) bench/accuracy.py smollm2
	$(PY) bench/accuracy.py qwen2.5-coder-0.5b

gpu-check: ext $(VENV)/.ready-dev ## test and measure the CUDA device on a GPU; where there is none, say so
	$(PY) bench/gpu_check.py

tables: ext ## write the generated tables of README.md and docs/
	$(PY) docs/make_tables.py

$(VENV)/.ready-plot: $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check -e '.[plot]'
	@touch $@

plots: ext $(VENV)/.ready-plot ## draw the plots of docs/images
	$(PY) docs/make_plots.py

clean: ## remove what was built (the virtual environment and the models stay)
	rm -rf $(BUILD) dist *.egg-info $(EXTENSION) pykvq/_native.c
