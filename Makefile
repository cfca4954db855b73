# Every target makes .venv when it is missing. `make help` lists the targets.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PURE := cluster merge_service pipeline workers temporal_merge.py temporal_merge_command.py

.DEFAULT_GOAL := help
.PHONY: help demo serve-demo test faults soak soak-service mutants reproduce reproduce-quick when-ema data-driven families audit browser check format docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@echo "installing torch, ray, mlflow and what they need into $(VENV): about 5 GB on disk, some minutes"
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[demo,test,dev]'
	@echo "installed; what follows needs no network"
	touch $@

demo: $(VENV)/.installed ## six tasks under seven strategies on real images, about five minutes on two cores
	$(BIN)/temporal-merge run configs/demo.yaml
	$(BIN)/temporal-merge report runs/demo

serve-demo: $(VENV)/.installed ## a live service from beginning to end: six experts arrive, one is removed, another time step served; some minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" sh configs/serve_demo.sh

test: $(VENV)/.installed ## the whole test suite, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

faults: $(VENV)/.installed ## the whole fault matrix, with nodes lost and hosts cut off; its table goes to docs/reliability.md
	$(BIN)/python -m pytest -m "fault or chaos" --matrix=docs/reliability.md

soak: $(VENV)/.installed ## twenty runs with three random faults each, about twenty minutes; RUNS and SEED may be set
	$(BIN)/python -m tests.faults.soak --runs $(or $(RUNS),20) $(if $(SEED),--seed $(SEED))

soak-service: $(VENV)/.installed ## the acceptance of the live service, row by row; ROWS="2 6", ARRIVALS and EXAMPLES may be set
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pipeline.service.soak $(if $(ROWS),--rows $(ROWS)) $(if $(ARRIVALS),--arrivals $(ARRIVALS)) $(if $(EXAMPLES),--examples $(EXAMPLES))

mutants: $(VENV)/.installed ## deliberately broken lines, each of which a test must catch, about ten minutes; ONLY="store outbox" for some
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(if $(ONLY),--only $(ONLY))

reproduce: $(VENV)/.installed ## TIME's claims, studied and judged: writes docs/reproduction.md; about three hours on two cores, goes on where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m pipeline.claims

reproduce-quick: $(VENV)/.installed ## one replicate of each study, half an hour to an hour; compares its scores and effects with the committed ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pipeline.claims --quick

when-ema: $(VENV)/.installed ## when ema -> ema beats fine-tuning: runs what is missing, writes docs/when_ema.md; about nine hours on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pipeline.claims.when_ema $(if $(REPLICATES),--replicates $(REPLICATES)) $(if $(PIECES),--pieces $(PIECES)) $(if $(MINUTES),--minutes $(MINUTES))

data-driven: $(VENV)/.installed ## what merges gain that see data: runs the study, writes docs/data_driven.md; about twenty minutes on two idle cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pipeline.claims.data_driven

families: $(VENV)/.installed ## 24 families of models x 8 techniques, opened by transformers and compared with torch: writes the table of docs/recipes.md; some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pipeline.recipes.families

audit: $(VENV)/.installed ## known advisories of everything that is installed (asks an advisory service)
	$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable > $(VENV)/installed.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r $(VENV)/installed.txt

browser: ## chromium for the tests of what people look at (Debian, as root; without it they are skipped and say so)
	command -v chromium >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }

check: $(VENV)/.installed ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PURE)

format: $(VENV)/.installed ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed ## build this project's site into site/, checking every link and anchor
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean: ## remove caches; data/ and runs/ stay
	rm -rf site .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
