# `make help` lists the targets. Everything happens in .venv; delete it to start afresh.
PYTHON ?= python3
# What is installed as torch, e.g. TORCH="torch==2.6.0" (CI's matrix), or a CPU build's own index option.
# torchaudio 2.11.0, its newest release, refuses to be imported beside a torch for another CUDA than 13.0, and
# transformers imports it where it is there: torch 2.15.0 (CUDA 13.2) breaks both. Without torchaudio any torch will do.
TORCH  ?= torch<2.15
TEXT   ?= The quick brown fox jumps over the lazy dog, and every word of it is spoken on your own machine.
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
WHEEL   = $(wildcard dist/accelerate_tts-*.whl)
SOURCES := $(shell find accelerate_tts -name '*.py' -o -name py.typed -o -path '*/csrc/*' 2>/dev/null) hatch_build.py

.PHONY: help demo kernels kernels-test kernels-tidy test test-slow coverage fuzz lint format types imports docs dev check clean \
	bench soak audit releases environments record peers service-load figures strangers strangers-page shared-steps gpu-dry-run serve \
	upstream-tests upstream-tests-page screenshots cluster-test cluster-sizing
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

.venv/.created:
	@echo "==> creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

# torch comes first and alone: it is the long download, and TORCH= chooses the build.
.venv/.torch: .venv/.created
	@echo "==> installing $(TORCH) (the long one; a CUDA build is several GB)"
	@$(PIP) '$(TORCH)'
	@touch $@

.venv/.demo: .venv/.torch pyproject.toml $(SOURCES)
	@echo "==> installing accelerate_tts[demo]"
	@$(PIP) '.[demo]' && $(PIP) --no-deps --force-reinstall .
	@touch $@

# The tests import the built wheel, never this folder.
.venv/.wheel: .venv/.torch pyproject.toml README.md $(SOURCES)
	@echo "==> building the wheel, installing accelerate_tts[test] from it"
	@rm -rf dist && $(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@$(PIP) "$$(ls dist/*.whl)[test]" && $(PIP) --no-deps --force-reinstall dist/*.whl
	@touch $@

.venv/.dev: .venv/.wheel
	@echo "==> installing accelerate_tts[dev]"
	@$(PIP) "$$(ls dist/*.whl)[dev]"
	@touch $@

demo: .venv/.demo ## Install into .venv and hear a decorated voice (out.wav); TEXT="..." to choose the words
	@$(BIN)/accelerate-tts demo "$(TEXT)" -o out.wav

.venv/.service: .venv/.torch pyproject.toml $(SOURCES)
	@echo "==> installing accelerate_tts[demo,service]"
	@$(PIP) '.[demo,service]' && $(PIP) --no-deps --force-reinstall .
	@touch $@

# From the examples' folder, so that the installed package is imported, which has the kernels.
serve: .venv/.service ## A speech service with a page on http://127.0.0.1:8000 (docs/SERVICE.md); ARGS="--port 9000"
	@cd examples && ../$(BIN)/python -m service --folder ../service_data $(ARGS)

# Two processes of one thread each: small tensors are computed no faster by two threads, which wait for each other
# instead. Tests that are about threads set their own number.
test: .venv/.wheel ## Build the wheel, install it with its test extra, run the tests (ARGS= goes to pytest)
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=2 --dist=loadfile -m "not slow" $(ARGS)

# Without those of the cluster, of which two at once have ended each other's nodes: see cluster-test.
test-slow: .venv/.wheel ## The tests that take long for what they show, and those of the example service
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=2 --dist=loadfile -m slow --ignore=tests/examples/cluster $(ARGS)

.venv/.cluster: .venv/.wheel
	@echo "==> installing accelerate_tts[cluster] (Ray, 240 MB)"
	@$(PIP) "$$(ls dist/*.whl)[cluster]"
	@touch $@

# One process: each test starts a cluster of two nodes, which takes minutes on a busy machine.
cluster-test: .venv/.cluster ## Install Ray, and run the tests of examples/cluster on two nodes of this machine
	@$(BIN)/python -c 'import ray'
	@OMP_NUM_THREADS=1 $(BIN)/pytest --timeout=900 tests/examples/cluster $(ARGS)

# One process, since the two of `make test` would have to be measured apart.
coverage: .venv/.dev ## Lines and branches of the package that the tests reach (ARGS= goes to pytest)
	@OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest --timeout=0 $(ARGS); status=$$?; $(BIN)/coverage report && exit $$status

fuzz: .venv/.wheel ## Damage files and the environment, edit weights: FUZZ=20000 examples a format; finds are kept in .hypothesis
	@FUZZ_EXAMPLES=$(or $(FUZZ),20000) OMP_NUM_THREADS=1 $(BIN)/pytest --timeout=0 tests/fuzz $(ARGS)

gpu-dry-run: .venv/.wheel ## benchmarks/gpu.sh on a CPU, to the end
	@GPU_DRY_RUN=1 OMP_NUM_THREADS=1 $(BIN)/pytest --timeout=0 tests/test_gpu_script.py $(ARGS)

shared-steps: .venv/.wheel ## Random callers share decode steps, bit for bit as alone: ARRIVALS=10000 of them
	@ARRIVALS=$(or $(ARRIVALS),10000) OMP_NUM_THREADS=1 $(BIN)/pytest --timeout=0 tests/stages/decode/test_shared_steps.py \
	  -k random $(ARGS)

lint: .venv/.dev ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: .venv/.dev ## Rewrite the code in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: .venv/.dev ## mypy --strict and pyright strict, on the package and tests/typing
	@$(BIN)/mypy
	@$(BIN)/pyright --pythonpath $(BIN)/python

imports: .venv/.dev ## import-linter: the floors of the house
	@$(BIN)/lint-imports

docs: .venv/.dev ## Build the documentation; a broken link fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

bench: .venv/.wheel ## Import time, cost of one call, demo ratio (run nothing else meanwhile)
	@$(BIN)/python benchmarks/overhead.py
	@$(BIN)/python benchmarks/voice.py

soak: .venv/.wheel ## 2,000 calls of tuned models; fails if memory or tensors grow (ARGS= goes to the script)
	@$(BIN)/python benchmarks/soak.py $(ARGS)

environments: .venv/.wheel ## Each environment that users have, built and run: hours; ONLY=name[,name] LAYERS=full KEEP=folder
	@$(BIN)/python benchmarks/environments/run.py $(ONLY) $(LAYERS:%=--layers %) $(KEEP:%=--keep %) $(ARGS); \
	  status=$$?; $(BIN)/python benchmarks/figures.py && exit $$status

record: .venv/.wheel ## Bench SYSTEMS="mms xtts" and store the figures in benchmarks/results (ARGS= goes to the bench; nothing else may run)
	@$(BIN)/python benchmarks/record.py $(SYSTEMS) $(ARGS)

peers: .venv/.wheel ## SYSTEM=llama|mms|demo|voice-clone|kokoro|f5 in other engines, in turn with eager and ours, stored as by record (ARGS= goes to the script)
	@$(BIN)/python benchmarks/peers.py $(SYSTEM) --into benchmarks/results $(ARGS)

service-load: .venv/.wheel ## The example service with 1 to 32 callers, plain against decorated, stored as by record (ARGS= goes to the script)
	@$(BIN)/python benchmarks/service_load.py --into benchmarks/results $(ARGS)

cluster-sizing: .venv/.cluster ## Speech an hour and processor of workers with one and two threads, in turn, stored as by record
	@$(BIN)/python benchmarks/workers.py --into benchmarks/results $(ARGS)

figures: .venv/.wheel ## Every table and chart of README and docs, from the files that runs have written
	@$(BIN)/python benchmarks/figures.py

.venv/.screenshots: .venv/.wheel
	@echo "==> installing accelerate_tts[screenshots]"
	@$(PIP) "$$(ls dist/*.whl)[screenshots]"
	@touch $@

screenshots: .venv/.screenshots ## The pictures of docs/figures, with an installed Chromium; ONLY="doctor receipt" (nothing else may run)
	@$(BIN)/python benchmarks/screenshots.py $(ONLY) $(ARGS)

strangers: .venv/.wheel ## Speech systems that no plan knows, decorated and compared with themselves; ONLY="bark csm" ARGS="--loads exact"
	@$(BIN)/python benchmarks/strangers/run.py $(ONLY) $(ARGS)

upstream-tests: .venv/.wheel ## transformers' own tests, untouched and with each model tuned; CHECKOUT=folder ONLY="vits csm"
	@$(BIN)/python benchmarks/upstream_tests/run.py $(CHECKOUT:%=--checkout %) $(ONLY) $(ARGS)

upstream-tests-page: .venv/.wheel ## docs/STRANGERS.md from the results that were written
	@$(BIN)/python benchmarks/upstream_tests/run.py --page

strangers-page: .venv/.wheel ## docs/STRANGERS.md from the results that were written
	@$(BIN)/python benchmarks/strangers/run.py --page

releases: .venv/.wheel ## Are the parts of each upstream release where models/*.py says they are? (fetches the releases)
	@$(BIN)/python .ci/releases.py $(ARGS)

# pip-audit in a folder of its own; where there is no network, audit.py says that nothing was checked, and passes.
.venv/.audit/.ready: .venv/.created
	@$(PYTHON) -m venv .venv/.audit && .venv/.audit/bin/python -m pip --disable-pip-version-check install --quiet pip-audit \
	  && touch $@ || rm -rf .venv/.audit

audit: .venv/.audit/.ready ## Known vulnerabilities of what is installed in .venv, by pip-audit; loud where that cannot be asked
	@$(BIN)/python .ci/audit.py

kernels: ## Build the kernels' library into this folder, for using it without installing it
	@$(PYTHON) accelerate_tts/kernels/build.py

# A program of its own, without torch and Python: under an emulator too, e.g.
# make kernels-test CXX=aarch64-linux-gnu-g++ MACHINE=aarch64 RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu"
kernels-test: ## Compare the kernels with plain loops, at each instruction set of this processor
	@CXX="$(CXX)" $(PYTHON) accelerate_tts/kernels/build.py --tests --target build/test_kernels --machine "$(MACHINE)"
	@$(RUN) build/test_kernels

kernels-tidy: ## clang-tidy over each unit of the kernels
	@$(PYTHON) accelerate_tts/kernels/build.py --commands >/dev/null
	@cd accelerate_tts/kernels/csrc && clang-tidy -p . --quiet *.cpp

dev: .venv/.dev ## Everything a contributor needs
	@$(BIN)/pre-commit install 2>/dev/null || true

check: test test-slow lint types imports docs ## All of these; .ci/run adds environments and the audit

clean: ## Remove .venv and everything built
	rm -rf .venv dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
