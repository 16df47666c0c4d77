# make demo | test | bench | bench-gpu | docs | outputs | readme | set-up | llama | clean. Needs python3 (3.10-3.12), make and git; PYTHON=python3.12 picks another interpreter.
PYTHON   ?= python3
VENV     ?= .venv
DEMO_OUT ?= demo_out
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip --disable-pip-version-check
# a few threads serve these small tensors best; in tests one, for JOBS processes at a time
export OMP_NUM_THREADS ?= 2
JOBS     ?= 2
export TOKENIZERS_PARALLELISM ?= false

# one stamp a step, named after what it depends on: nothing is installed twice, and nothing stale is kept
VENV_KEY := $(shell { echo "$(CURDIR) $(VENV)"; $(PYTHON) -c 'import sys; print(sys.version, sys.base_prefix)'; } | cksum | cut -d' ' -f1)
KEY      := $(shell cat settings.ini constraints.txt setup.py Makefile | cksum | cut -d' ' -f1)
VENV_OK  := $(VENV)/.venv-$(VENV_KEY)
# Test oracles. mergekit and AutoAWQ are only asked whether our numbers agree with theirs, so they come without what they
# declare: triton for kernels that need a GPU, protobuf and sentencepiece for other people's tokenizers. That saves 600 MB.
ORACLES  := mergekit immutables autoawq
# llama.cpp: compiled from the sources of its Python binding, which hold the GGUF converter too
LLAMA    := llama-cpp-python==0.3.36
export LLAMA_CPP ?= $(abspath $(VENV))/llama.cpp
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
LLAMA_OK := $(VENV)/.$(subst ==,-,$(LLAMA))
# Triton runs the GPU's kernels in its interpreter there; beside the environment, so that nothing else sees it
TRITON    := triton==3.9.0
TRITON_OK := $(VENV)/.$(subst ==,-,$(TRITON))
RUN_OK   := $(VENV)/.run-$(KEY)
DEV_OK   := $(VENV)/.dev-$(KEY)

.PHONY: demo test bench bench-gpu set-up llama docs outputs readme clean

demo: $(RUN_OK)
	rm -rf "$(DEMO_OUT)"
	$(BIN)/moe-fuse run demo "$(DEMO_OUT)" --keep 0.25

# a process for each notebook: none sees what another patched
test: export OMP_NUM_THREADS = 1
test: $(DEV_OK) $(LLAMA_OK) $(TRITON_OK)
	@fail=0; printf '%s\n' nbs/*.ipynb | xargs -P $(JOBS) -I{} sh -c 'out=$$($(BIN)/python -m pytest -q -ra {} 2>&1); rc=$$?; echo "{}: $$out"; exit $$rc' || fail=1; \
	$(BIN)/python -m pytest -q -ra -n $(JOBS) --dist loadfile tests || fail=1; exit $$fail

# speed, beside peers and ceilings, in under ten minutes on two cores: results/benchmarks-cpu.json. llama.cpp's rows need `make llama` first
bench: $(DEV_OK)
	$(BIN)/python bench/all.py

bench-gpu: $(DEV_OK)
	$(BIN)/python bench/all.py --device cuda --timeout 600

set-up: $(DEV_OK)

llama: $(LLAMA_OK)

docs: $(DEV_OK)
	$(BIN)/python tools/site.py

outputs: $(DEV_OK)
	$(BIN)/python tools/run_nbs.py

readme: $(DEV_OK)
	$(BIN)/python tools/site.py readme

clean:
	rm -rf "$(VENV)" "$(DEMO_OUT)" _docs _proc build dist *.egg-info .pytest_cache .hypothesis

$(VENV_OK):
	$(PYTHON) -m venv --clear "$(VENV)"
	@touch $@

$(RUN_OK): $(VENV_OK)
	$(PIP) install -q -c constraints.txt -e .
	@rm -f $(VENV)/.run-*; touch $@

$(DEV_OK): $(RUN_OK)
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	$(PIP) install -q -c constraints.txt --no-deps $(ORACLES)
	@rm -f $(VENV)/.dev-*; touch $@

$(TRITON_OK): | $(DEV_OK)
	rm -rf $(VENV)/triton && $(PIP) install -q --no-deps --target $(VENV)/triton $(TRITON)
	@rm -f $(VENV)/.triton-*; touch $@

# a compiler may be missing: then the tests that need llama.cpp are skipped, except where CI is set
$(LLAMA_OK): | $(DEV_OK)
	rm -rf $(VENV)/llama && mkdir -p $(VENV)/llama
	-cd $(VENV)/llama && ../bin/python -m pip --disable-pip-version-check download -q --no-deps --no-binary :all: $(LLAMA) && tar xzf *.tar.gz --strip-components=1 && \
	../bin/python -m pip --disable-pip-version-check install -q -c "$(CURDIR)/constraints.txt" diskcache && ../bin/python -m pip --disable-pip-version-check install -q --no-deps ./*.tar.gz && \
	rm -rf ../llama.cpp && mkdir ../llama.cpp && mv vendor/llama.cpp/convert_hf_to_gguf.py vendor/llama.cpp/conversion vendor/llama.cpp/gguf-py vendor/llama.cpp/LICENSE ../llama.cpp/ && touch ../$(notdir $@)
	rm -rf $(VENV)/llama
