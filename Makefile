# Holdfast. `make` lists the targets; every target builds its own environment in .venv first.

# What a person may set. Nothing set: a tiny model and text, made offline.
MODEL   ?=
DATA    ?=
RUN     ?=
OUT     ?=
RECIPE  ?=
SAMPLES ?=
SEQ     ?=
BATCH   ?=
DEVICE  ?=
ARGS    ?=

# Values reach the commands as environment variables, exactly as they were typed: make expands none, and the shell
# sees them within double quotes only. ARGS alone is words for the shell. What is empty is left to holdfast.
unexport MODEL DATA RUN OUT RECIPE SAMPLES SEQ BATCH DEVICE ARGS
export model   := $(or $(value MODEL),demo/model)
export data    := $(or $(value DATA),$(if $(value MODEL),,demo/text.jsonl))
export run     := $(or $(value RUN),$(if $(value MODEL),,runs/demo))
export recipe  := $(value RECIPE)
export samples := $(or $(value SAMPLES),$(if $(value MODEL),,128))
export seq     := $(or $(value SEQ),$(if $(value MODEL),,256))
export batch   := $(value BATCH)
export device  := $(value DEVICE)
export out     := $(or $(value OUT),$(if $(value RUN)$(value MODEL),,exports/demo-$(or $(notdir $(value RECIPE)),nvfp4)))
args           = $(value ARGS)

VENV    ?= .venv
NEWEST  := python3 python3.14 python3.13 python3.12 python3.11
PYTHON  ?= $(shell for python in $(NEWEST); do \
             $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
READY   := $(VENV)/.holdfast-ready

.DEFAULT_GOAL := help
.PHONY: help quantize calibrate export recipes verify status check repair test test-newest test-oldest test-long test-families lint crash-test crash-test-full bench clean

help:  ## this list
	@echo "Holdfast: crash-safe post-training quantization for Hugging Face models"; echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
	  printf '%-18s %s\n' "$$target" "$$text"; done
	@echo; echo "  Variables: MODEL DATA RUN OUT RECIPE SAMPLES SEQ BATCH DEVICE ARGS, such as"
	@echo "  make quantize MODEL=Qwen/Qwen3-30B-A3B DATA=chats.jsonl OUT=exports/qwen3-nvfp4"
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

quantize: $(READY) $(if $(value MODEL),,demo/model/config.json)  ## both in one: MODEL and DATA to the checkpoint OUT, the run kept in OUT-run or RUN
	@$(call needs,data out)
	@$(VENV)/bin/holdfast quantize "$$model" "$$data" "$$out" $(call options,run samples seq batch device recipe) $(args)

calibrate: $(READY) $(if $(value MODEL),,demo/model/config.json)  ## measure MODEL on DATA into RUN (nothing given: a tiny demo)
	@$(call needs,data run)
	@$(VENV)/bin/holdfast calibrate "$$model" "$$data" "$$run" $(call options,samples seq batch device recipe) $(args)

export: $(READY)  ## turn RUN into the checkpoint OUT (nothing given: the demo's run as NVFP4)
	@$(call needs,run out)
	@$(VENV)/bin/holdfast export "$$run" "$$out" $(call options,recipe) $(if $(value MODEL),--model "$$model") $(args)

recipes: $(READY)  ## every recipe that modelopt ships, served or why not (MODEL: judged on that model)
	@$(VENV)/bin/holdfast recipes $(if $(value MODEL),--model "$$model") $(args)

verify: $(READY)  ## prove that engines read the checkpoint OUT rightly (nothing given: the demo's)
	@$(call needs,out)
	@$(VENV)/bin/holdfast verify "$$out" $(if $(value MODEL),--model "$$model") $(args)

status: $(READY)  ## how far RUN is, also while it calibrates
	@$(VENV)/bin/holdfast status "$${run:-runs/demo}" $(args)

check: $(READY)  ## verify every file of RUN
	@$(VENV)/bin/holdfast check "$${run:-runs/demo}" $(args)

repair: $(READY)  ## mend RUN from what is whole; what is damaged is set aside
	@$(VENV)/bin/holdfast repair "$${run:-runs/demo}" $(args)

# Tests of one file share what they are given, and a process for each core leaves one thread to each.
WORKERS := --numprocesses auto --maxprocesses 4 --dist loadscope

test: $(READY)  ## all tests but the long ones
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(WORKERS) $(args)

test-long: $(READY)  ## the long tests alone: the wheel in an environment of its own
	@$(VENV)/bin/python -m pytest -m long $(args)

test-families: $(READY)  ## every family of models in its hub's layout, all recipes, both schedules: writes docs/families.md
	@$(VENV)/bin/python -m tests.families $(args)

test-newest: .venv-newest/.holdfast-ready  ## the tests with the newest libraries that pyproject.toml allows
	@OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(WORKERS) $(args)

test-oldest: .venv-oldest/.holdfast-ready  ## the tests with the oldest
	@OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(WORKERS) $(args)

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

crash-test: $(READY)  ## disturb every kind of file operation of the commands, half an hour (ARGS=--seed=N repeats)
	@$(VENV)/bin/python -m tests.crash --minutes 25 $(args)

crash-test-full: $(READY)  ## all kinds with all faults, hours (ARGS="--seed 1 --shard 1/8 --json FILE")
	@$(VENV)/bin/python -m tests.crash --full --series 100 $(args)

bench: $(READY)  ## speed and memory beside modelopt's (ARGS="--device cuda" on a GPU)
	@$(VENV)/bin/python -m benchmarks.bench $(args)

clean:  ## remove the environment and the demo (runs and exports of your own stay)
	rm -rf $(VENV) .venv-newest .venv-oldest demo runs/demo exports/demo-* build *.egg-info .pytest_cache .mypy_cache \
	  .ruff_cache .hypothesis

# $(call options,NAMES): the options of those that have a value; $(call needs,NAMES): ends where one has none.
options = $(foreach name,$(1),$(if $($(name)),--$(name) "$$$(name)"))
needs   = $(foreach name,$(1),$(if $($(name)),,echo "make $@: $(shell echo $(name) | tr a-z A-Z) is missing. Such as: \
  make $@ $(if $(filter export,$@),RUN=runs/name,MODEL=path-or-hub-id DATA=text.jsonl) \
  $(if $(filter calibrate,$@),RUN=runs/name,OUT=exports/name)" \
  >&2; exit 2;)) true
