# The newcomer's commands. `make help` lists them.
# Every target stands on `make install`, which does nothing when .venv is up to date.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# CUDA libraries only where a driver answers.
XGB    := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
STAMP  := $(VENV)/.installed-$(XGB)

.DEFAULT_GOAL := help
.PHONY: help install lock demo up down test bench bench-tools check lint types imports format pictures clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv with every pinned package

$(STAMP): pyproject.toml constraints.txt deploy/bootstrap.sh
	@sh deploy/bootstrap.sh "$(PYTHON)" "$(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(XGB),serving,otel,s3,postgres,ray,bench,dev]' --constraint constraints.txt
	@rm -f $(VENV)/.installed-*; touch $@

lock: install ## write the installed versions into constraints.txt
	$(BIN)/python -m mlplatform.local.lock > constraints.tmp && mv constraints.tmp constraints.txt

demo: install ## the whole loop on real flights, in minutes
	@$(BIN)/mlplatform demo

up: install ## the platform, left running: lineage UI, MLflow, prediction service
	@$(BIN)/mlplatform up

down: install ## stop what `make up` or `demo --keep` started
	@$(BIN)/mlplatform down

test: install ## every test, on real components
	@$(BIN)/python -m pytest -n 2 --dist loadfile

bench: install ## the model's quality on the whole year, beside its bounds
	@$(BIN)/mlplatform bench quality

bench-tools: ## install wrk, which makes the load of `mlplatform bench serving`
	@sh deploy/bench_tools.sh

check: install lint types imports ## lint, types, import rules

lint: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install
	@$(BIN)/mypy

imports: install
	@$(BIN)/lint-imports

format: install ## write the code the way the linter wants it
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

pictures: install ## renew the guide's pictures with headless Chromium
	@$(BIN)/python -m mlplatform.local.pictures

clean: install ## stop the platform and remove what it wrote (not .venv)
	@$(BIN)/mlplatform down
	@rm -rf .mlplatform
