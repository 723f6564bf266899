# Everything runs in .venv, which is made on first use. May be given: PYTHON, PIP_ARGS, TESTS for `make test`, and, for
# `make evidence`, ONLY=NAMES, AGAIN=1 and GIVEN=WORD=VALUE.
PYTHON ?= python3
PIP_ARGS ?=
TESTS ?=
ONLY ?=
AGAIN ?=
GIVEN ?=
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
VENV := .venv
BIN := $(VENV)/bin
# One line that counts the packages in place of pip's hundreds; pip's errors go to stderr and are shown as they are.
COUNT := { n=0; while read -r word name _; do case $$word in \
  Collecting) n=$$((n+1)); printf '\r  %3d packages, now %-40.40s' $$n "$$name";; \
  Installing) [[ $$name != collected ]] || printf '\r  %3d packages, unpacking %-35s' $$n '';; esac; done; echo; }
INSTALL = PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
  -c constraints.txt $(PIP_ARGS)

.PHONY: demo ui test test-quantized same-tests soak lint types bench evidence demo-base demo-multimodal-base clean

demo: $(VENV)/.installed  # compares learning rates on the embedded model
	$(BIN)/equipoise demo

ui: $(VENV)/.installed-ui  # the web page
	$(BIN)/equipoise ui

test: $(VENV)/.installed-dev  # one process per core, each with one thread, and a file's tests in one of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile \
	  --no-loadscope-reorder --max-worker-restart 0 --durations 25 $(TESTS)

test-quantized: $(VENV)/.installed-dev  # with bitsandbytes, apart, for it slows every import of peft
	[ -d $(VENV)/quantized ] || $(INSTALL) --quiet --no-deps --target $(VENV)/quantized bitsandbytes
	PYTHONPATH=$(VENV)/quantized OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
	  tests/pipelines/instruction_tuning/test_quantized.py tests/pipelines/text_to_image/test_quantize.py

same-tests: $(VENV)/.installed-dev  # every process must collect the same tests, at any hour and anywhere, or none are run
	OMP_NUM_THREADS=1 $(BIN)/python tests/collect_twice.py

soak: $(VENV)/.installed-dev,ray  # every fault many times, and much hostile input; writes the tables of docs/reliability.md
	$(BIN)/python tests/soak.py --fuzz 300 --write
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m soak

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  # the type checker sees the folders under their import names through links
	rm -rf .types && mkdir -p .types/equipoise
	ln -s $(addprefix ../../,$(wildcard plugin/*) pipelines ui configs) .types/equipoise/
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/optimizer_step.py

evidence: $(VENV)/.installed-dev  # what every published table says beside what its command gives now: many hours, goes on
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py $(if $(ONLY),--only $(ONLY)) $(if $(AGAIN),--again) $(if $(GIVEN),--given $(GIVEN))

demo-base: $(VENV)/.installed  # trains the embedded model again: tens of minutes
	$(BIN)/python -m equipoise.pipelines.demo.train_base

demo-multimodal-base: $(VENV)/.installed  # trains the embedded vision-language model again: tens of minutes
	$(BIN)/python -m equipoise.pipelines.demo.train_multimodal_base

clean:
	rm -rf $(VENV) .types build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Equipoise needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make $(MAKECMDGOALS) PYTHON=python3.11")'
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# The stamps: pip runs again only when what is to be installed has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Equipoise (some minutes the first time)"
	@$(INSTALL) -e . | $(COUNT)
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Equipoise with its extra: $* (some minutes the first time)"
	@$(INSTALL) -e ".[$*]" | $(COUNT)
	@touch $@
