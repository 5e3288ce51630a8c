# Two commands set up everything on a machine that has Python 3.11: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# Where a bare torch would bring gigabytes of CUDA that you do not need, say for instance
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Processes that share the test suite.
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.frostline-installed
# What the tests and the demo train on.
ASSETS := minilm trec
DEMO_RUN := runs/trec-demo-seed0
# Many small models: one thread each is fastest, and no test may wait for a hub.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help venv fetch demo test test-faults test-slow test-browser test-gpu bench bench-gpu lint types

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=\"$(TORCH)\" WORKERS=$(WORKERS)"

venv: $(STAMP) ## make the virtual environment and install Frostline with everything

# Installed again only when pyproject.toml is newer than the last installation.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@# Debian's python3 comes without ensurepip; virtualenv then does what venv cannot.
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV) && \
		$(PYTHON) -m pip install --quiet --target $(VENV)-bootstrap virtualenv && \
		PYTHONPATH=$(VENV)-bootstrap $(PYTHON) -m virtualenv --quiet $(VENV) && \
		rm -rf $(VENV)-bootstrap; }
	@# torch first and alone, so that nothing else chooses its build.
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[all,dev]'
	@touch $@

fetch: $(STAMP) ## fetch the model and the data of the demo and the tests
	@$(BIN)/frostline fetch $(ASSETS)

demo: fetch ## fine-tune a real model with and without freezing, and report both
	$(BIN)/frostline run trec-demo baseline=full output_dir=$(DEMO_RUN) overwrite=true
	$(BIN)/frostline report $(DEMO_RUN)

test: fetch ## run the tests
	@# A worker that dies ends the run, red: replaced, pytest-xdist 3.8 may wait for ever (its issue 1378).
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0

test-faults: fetch ## run the long tests that kill and break things
	$(TEST_ENV) $(BIN)/python -m pytest -m faults

test-slow: $(STAMP) ## run the tests that take minutes or need more models and data (250 MB)
	@$(BIN)/frostline fetch $(ASSETS) dinov2-small efficientnet-lite0 fashion-mnist
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

test-browser: $(STAMP) ## look at the report in headless Chromium (installs Debian's where there is none)
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || \
		{ command -v apt-get > /dev/null && apt-get update -q && apt-get install -q -y chromium; } || \
		{ echo "Chromium is needed, and could not be installed here"; exit 1; }
	$(TEST_ENV) $(BIN)/python -m pytest -m browser

test-gpu: $(STAMP) ## run the tests that need a CUDA device
	$(TEST_ENV) $(BIN)/python -m pytest -m gpu -s

bench: $(STAMP) ## measure everything the README quotes (about two hours on a quiet machine)
	@$(BIN)/frostline fetch minilm mpnet trec reuters8
	$(BIN)/python benchmarks/accuracy.py trec --seeds 5 --threads 2
	$(BIN)/python benchmarks/step_time.py minilm --threads 2
	$(BIN)/python benchmarks/step_time.py mpnet --part depths --part statistics --rounds 8 --threads 2
	$(BIN)/python benchmarks/cache.py minilm --rounds 5 --threads 2
	$(BIN)/python benchmarks/cache.py minilm --tier disk --rounds 5 --threads 2
	$(BIN)/python benchmarks/disk.py
	$(BIN)/python benchmarks/gradients.py trec --threads 2
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/forecast.py
	$(BIN)/python benchmarks/table.py

bench-gpu: $(STAMP) ## measure tiers, memory and time of compression on a GPU, shapes of base size (some minutes)
	$(BIN)/python benchmarks/cache.py --base --device cuda --rounds 5 --tier device
	$(BIN)/python benchmarks/cache.py --base --device cuda --rounds 5 --tier memory
	$(BIN)/python benchmarks/cache.py --base --device cuda --rounds 5 --tier disk
	$(BIN)/python benchmarks/memory.py bert --device cuda
	$(BIN)/python benchmarks/memory.py bert --device cuda --part time --rows 32 --rounds 20
	$(BIN)/python benchmarks/memory.py vit --device cuda --part time --rows 32 --rounds 20
	$(BIN)/python benchmarks/budgets.py bert --device cuda --rows 32 --rounds 10

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict, over src
	$(BIN)/mypy
