# make quickstart   install, and teach the default base to call functions
# make check        install, lint, and run the tests that neither train, decode nor start a process: 2 minutes
# make test         install, and run all tests; the slow ones in three processes, since they wait for servers half of the time
# make test-other-cpu   run the tests that compare numbers as if on another processor
# make docs         install, regenerate docs/cli.md and docs/knobs.md, and build the pages into site/
# make audit        install, and ask a database of advisories about every pin; it fails if that could not be asked
# make test-matrix  run the light tests with the oldest and the newest of each bound, in environments of their own
# make bench        install, and compare training speed with peers, in 15 minutes or so: tables and plots in runs/bench
# The first that runs: a name on the PATH may be a version manager's that is not installed.
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.13 python3.12 python3.11; do $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart check test test-other-cpu audit test-matrix bench docs lint clean

define NEXT

The report: runs/quickstart/report.html
Try next, after source $(BIN)/activate:
  graft generate run=runs/quickstart compare=true prompt="What is the weather in Paris?" system='Answer with one function call as JSON: {"name": ..., "arguments": {...}}. The functions: [{"name": "get_weather", "parameters": {"city": {"type": "string"}}}]'
  graft serve run=runs/quickstart
  graft compare runs
endef
export NEXT

quickstart: $(VENV)/.installed
	$(BIN)/python -m trainer experiment=quickstart
	@printf '%s\n' "$$NEXT"

check: lint
	$(BIN)/python -m pytest -n 2 -m "not run and not long and not slow and not gpu and not slurm"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest -n 3 -m slow
	$(BIN)/python -m pytest -m slurm

test-other-cpu: export ATEN_CPU_CAPABILITY = default
test-other-cpu: export ONEDNN_MAX_CPU_ISA = AVX2
test-other-cpu: export MKL_ENABLE_INSTRUCTIONS = SSE4_2
test-other-cpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -p tests.other_processor \
		tests/adapters tests/drafters tests/penalties tests/speed/test_fused.py

test-matrix: $(VENV)/.installed-dev
	$(BIN)/python -m scripts.matrix

bench: $(VENV)/.installed-dev
	-$(BIN)/python -m scripts.bench.train --install
	$(BIN)/python -m scripts.bench.train out=runs/bench/chat data=chat batch_size=4 steps=7 warm=2 rounds=2 minutes=3
	$(BIN)/python -m scripts.bench.train out=runs/bench/packed-256 data=packed batch_size=4 steps=7 warm=2 rounds=2 minutes=3
	$(BIN)/python -m scripts.bench.train out=runs/bench/packed-1024 data=packed length=1024 batch_size=1 steps=7 warm=2 rounds=2 minutes=2 contestants=[ours,hf_strongest]
	$(BIN)/python -m scripts.bench.train out=runs/bench/packed-4096 data=packed length=4096 batch_size=1 steps=4 warm=1 rounds=2 minutes=4 contestants=[ours,hf_strongest]

audit: $(VENV)/.installed
	$(BIN)/python -m scripts.audit

docs: $(VENV)/.installed-docs
	$(BIN)/python -m scripts.docs
	$(BIN)/python -m scripts.chat_templates
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found. Name it: make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$("$(PYTHON)" --version). Name another: make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { echo "A virtual environment could not be made. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[serve]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV)
