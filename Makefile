# make demo   the main job on real text          make bench     figures and docs/benchmarks.md
# make test   everything that must hold           make gates     every GPU configuration compiled
# make lint   ruff and clang-format               make accuracy  training runs (minutes to hours)
# make sanitize   the CPU ops under ASan and UBSan (half an hour: it compiles the library anew)
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
SOURCES := $(shell find csrc -type f -name '*.[ch]*') setup.py pyproject.toml
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: all demo test lint format bench gates accuracy sanitize build clean
all: build

# torch==2.13.0 first: a bare "torch" may bring gigabytes of CUDA.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -U pip
	$(PY) -c "import torch" 2>/dev/null || $(PIP) install "torch==2.13.0"
	$(PIP) install "setuptools>=77" wheel pybind11 ninja numpy
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e .
	touch $@

# Each of these builds the library once, together with what it needs to run.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[demo,cli]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.bench: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[bench]"
	touch $@

build: $(VENV)/.built

demo: $(VENV)/.demo
	$(PY) examples/demo.py

# Two processes (each up to 4 GB) of one thread; what is about threads sets more, and those that wait
# sleep. Freed memory is kept: to give it back and fault it in again was a tenth of the time.
TEST_JOBS ?= 2
BESIDE = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive MALLOC_MMAP_MAX_=0 MALLOC_TOP_PAD_=16777216 \
	MALLOC_TRIM_THRESHOLD_=4000000000 $(PY) -m pytest -n $(TEST_JOBS)

test: $(VENV)/.test lint
	$(BESIDE) --dist loadfile tests -m "not slow" --ignore=tests/interpreter --ignore=tests/gates
	TRITON_INTERPRET=1 $(BESIDE) --dist worksteal tests/interpreter
	$(BESIDE) --dist worksteal tests/gates -m "not slow"

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(VENV)/bin/clang-format -i

bench: $(VENV)/.bench
	$(PY) -m bench.run

gates: $(VENV)/.test
	$(PY) -m pytest tests/gates
	$(PY) -m pytest tests -m slow --ignore=tests/interpreter --ignore=tests/gates

accuracy: $(VENV)/.test
	$(PY) -m bench.accuracy_setfit
	$(PY) -m bench.accuracy_gliner

SANITIZED_OPS := $(addsuffix .py,$(addprefix tests/test_,add_layer_norm attention_arguments \
	disentangled_attention dropout flash_attn geglu matrix_product op_arguments rope segment_pool \
	span_candidates span_pool span_score token_score varlen_attention))
SANITIZERS = $(foreach l,libasan.so libubsan.so libstdc++.so.6,$(shell g++ -print-file-name=$(l)))
# The options in the environment, so that tests which start another pytest hand them on.
SANITIZED_PYTEST = FASTENC_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(SANITIZERS)" \
	PYTEST_ADDOPTS="--capture=sys -o pythonpath=build/sanitize/lib" $(PY) -m pytest
ISAS = portable $(foreach i,avx2 avx512f,$(shell grep -qw $(i) /proc/cpuinfo && echo $(i:f=)))

sanitize: $(VENV)/.test
	FASTENC_SANITIZE=1 FASTENC_CUDA=0 $(PY) setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	set -e; for isa in $(ISAS); do echo "$$isa:"; \
		FASTENC_CPU_ISA=$$isa $(SANITIZED_PYTEST) $(SANITIZED_OPS) \
		-k "not reference and not instruction_set and not compiles and not opcheck"; done
	$(SANITIZED_PYTEST) tests/test_gliner_predict.py -k "greedy_search or token_spans or nonsense"

clean:
	rm -rf build dist *.egg-info fastenc/_C*.so fastenc/_cuda*.so
