# Holdfast. `make` lists the targets; every target builds its own environment in .venv first.

# What a person may set. Nothing set: a tiny model and text, made offline.
MODEL   ?=
DATA    ?=
RUN     ?=
OUT     ?=
RECIPE  ?=
SAMPLES ?=
SEQ     ?=
BATCH   ?= 8
DEVICE  ?= auto
ARGS    ?=

model   := $(or $(MODEL),demo/model)
data    := $(or $(DATA),$(if $(MODEL),,demo/text.jsonl))
run     := $(or $(RUN),$(if $(MODEL),,runs/demo))
samples := $(or $(SAMPLES),$(if $(MODEL),512,128))
seq     := $(or $(SEQ),$(if $(MODEL),2048,256))
out     := $(or $(OUT),$(if $(RUN),,exports/demo-$(or $(notdir $(RECIPE)),nvfp4)))

VENV    ?= .venv
NEWEST  := python3 python3.14 python3.13 python3.12 python3.11
PYTHON  ?= $(shell for python in $(NEWEST); do \
             $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
READY   := $(VENV)/.holdfast-ready

.DEFAULT_GOAL := help
.PHONY: help calibrate export status test test-newest test-oldest lint crash-test bench clean

help:  ## this list
	@echo "Holdfast: crash-safe post-training quantization for Hugging Face models"; echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
	  printf '%-18s %s\n' "$$target" "$$text"; done
	@echo; echo "  Variables: MODEL DATA RUN OUT RECIPE SAMPLES SEQ BATCH DEVICE ARGS, such as"
	@echo "  make calibrate MODEL=Qwen/Qwen3-30B-A3B DATA=chats.jsonl RUN=runs/qwen3 SAMPLES=512 SEQ=2048"
	@echo "  make export RUN=runs/qwen3 OUT=exports/qwen3-fp8 RECIPE=fp8"
	@echo "  All options of a command: make calibrate ARGS=--help, make export ARGS=--help"

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Holdfast needs Python 3.11 or newer; found none of: $(NEWEST). \
	Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Holdfast needs Python 3.11 or newer, \
	and $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo/model/config.json: pipeline/demo.py | $(READY)
	@$(VENV)/bin/python -m pipeline.demo demo

calibrate: $(READY) $(if $(MODEL),,demo/model/config.json)  ## measure MODEL on DATA into RUN (nothing given: a tiny demo)
	@$(call needs,data run)
	@$(VENV)/bin/holdfast calibrate '$(model)' '$(data)' '$(run)' --samples $(samples) --seq $(seq) \
	  --batch $(BATCH) --device $(DEVICE) $(if $(RECIPE),--recipe '$(RECIPE)') $(ARGS)

export: $(READY)  ## turn RUN into the checkpoint OUT (nothing given: the demo's run as NVFP4)
	@$(call needs,run out)
	@$(VENV)/bin/holdfast export '$(run)' '$(out)' $(if $(RECIPE),--recipe '$(RECIPE)') \
	  $(if $(MODEL),--model '$(MODEL)') $(ARGS)

status: $(READY)  ## how far RUN is, also while it calibrates
	@$(VENV)/bin/holdfast status '$(or $(RUN),runs/demo)' $(ARGS)

test: $(READY)  ## all tests but the long ones
	@$(VENV)/bin/python -m pytest $(ARGS)

test-newest: .venv-newest/.holdfast-ready  ## the tests with the newest libraries that pyproject.toml allows
	@.venv-newest/bin/python -m pytest $(ARGS)

test-oldest: .venv-oldest/.holdfast-ready  ## the tests with the oldest
	@.venv-oldest/bin/python -m pytest $(ARGS)

# torch stays at the version of constraints.txt: a newer one, of several GB, would bring CUDA along.
.venv-newest/.holdfast-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	  --constraint .venv-newest/constraints.txt --editable '.[dev]'
	@touch $@

.venv-oldest/.holdfast-ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	@touch $@

lint: $(READY)  ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

crash-test: $(READY)  ## kill calibrate and export at random moments and compare bytes (ARGS=--seed=N repeats one)
	@$(VENV)/bin/python -m tests.crash $(ARGS)

bench: $(READY)  ## speed and memory beside modelopt's (ARGS="--device cuda" on a GPU)
	@$(VENV)/bin/python -m benchmarks.bench $(ARGS)

clean:  ## remove the environment and the demo (runs and exports of your own stay)
	rm -rf $(VENV) .venv-newest .venv-oldest demo runs/demo exports/demo-* build *.egg-info .pytest_cache .mypy_cache \
	  .ruff_cache .hypothesis

needs = $(foreach name,$(1),$(if $($(name)),,echo "make $@: $(shell echo $(name) | tr a-z A-Z) is missing. Such as: \
  make $@ $(if $(filter calibrate,$@),MODEL=path-or-hub-id DATA=text.jsonl RUN=runs/name,RUN=runs/name OUT=exports/name)" \
  >&2; exit 2;)) true
