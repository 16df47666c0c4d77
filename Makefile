# make demo | test | docs | outputs | readme | set-up | clean. Needs python3 (3.10-3.12), make and git; PYTHON=python3.12 picks another interpreter.
PYTHON   ?= python3
VENV     ?= .venv
DEMO_OUT ?= demo_out
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip --disable-pip-version-check
# cells and tests run in one process: a few threads serve these small tensors best
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

# one stamp a step, named after what it depends on: nothing is installed twice, and nothing stale is kept
VENV_KEY := $(shell { echo "$(CURDIR) $(VENV)"; $(PYTHON) -c 'import sys; print(sys.version, sys.base_prefix)'; } | cksum | cut -d' ' -f1)
KEY      := $(shell cat settings.ini constraints.txt setup.py Makefile | cksum | cut -d' ' -f1)
VENV_OK  := $(VENV)/.venv-$(VENV_KEY)
# Test oracles. mergekit and AutoAWQ are only asked whether our numbers agree with theirs, so they come without what they
# declare: triton for kernels that need a GPU, protobuf and sentencepiece for other people's tokenizers. That saves 600 MB.
ORACLES  := mergekit immutables autoawq
RUN_OK   := $(VENV)/.run-$(KEY)
DEV_OK   := $(VENV)/.dev-$(KEY)

.PHONY: demo test set-up docs outputs readme clean

demo: $(RUN_OK)
	rm -rf "$(DEMO_OUT)"
	$(BIN)/moe-fuse run demo "$(DEMO_OUT)" --keep 0.25

test: $(DEV_OK)
	@fail=0; for nb in nbs/*.ipynb; do echo $$nb; $(BIN)/python -m pytest -q -ra $$nb || fail=1; done; \
	$(BIN)/python -m pytest -q -ra tests || fail=1; exit $$fail   # a process for each notebook: none sees what another patched

set-up: $(DEV_OK)

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
