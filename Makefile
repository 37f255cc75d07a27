# Every task of the project. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV ?= .venv
PY := $(VENV)/bin/python
export RAW DT DATASET STAGE CONFIG TARGET_DAYS LOOKBACK_DAYS EVALUATION_DAYS MAX_HISTORY WARM_START ON_WARNING WORKERS REASON BY KEEP FROM ACTION VERSION
export LONGVIEW_VENV := $(abspath $(VENV))

.PHONY: help setup data run test readme test-slow bench-etl bench-train bench-multigpu compare claims validate let-through release reproduce prune lint up down backup restore lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make or refresh .venv from requirements.txt (nothing to do: instant)
	@infra/local/bootstrap.sh

data: setup ## fetch a published data set into var/raw/<name>, with resume: DATASET=kuairand_1k
	@name="$$(basename "$$DATASET")" && name="$$(tr A-Z- a-z_ <<< "$${name%.y*ml}")" && \
		$(PY) -m etl.ingest.download --dataset "$$DATASET" --to "$${LONGVIEW_HOME:-var}/raw/$$name"

run: setup ## one partition through Airflow's scheduler; RAW=folder DT=YYYY-MM-DD DATASET=name or path of name.yaml; without RAW simulated data
	@$(PY) -m infra.local.run

test: setup ## the tests that take minutes, not more
	@$(PY) -m pytest -m "not slow" --numprocesses logical --maxprocesses 4 --dist loadfile

readme: setup ## every command that README.md and docs/datasets.md show, as far as this machine has the data, in a home of its own
	@$(PY) -m pytest -m slow --durations=0 tests/test_readme.py

# Those of Airflow wait for its scheduler most of the time: they run beside the others, and are shown after them.
test-slow: setup ## the other tests: real schedulers, browser, cluster, killed processes, trainings, every command of README; SEEDS=11,12,13 trains more
	@$(PY) -m pytest -m slow --numprocesses 2 --dist loadfile --durations=0

bench-train: setup ## speed of training, GPU or CPU: steps, their floor, the loop, resume; ARGS="--package var/peers" against FuxiCTR's models, too
	@$(PY) -m benchmarks.train_step $(ARGS)

bench-multigpu: setup ## training on several GPUs of this machine against one; ARGS="--gpus 1,2 --items 20000,4000000"
	@$(PY) -m benchmarks.multi_gpu $(ARGS)

bench-etl: setup ## speed and size of the Spark jobs on 20 M simulated rows, against DuckDB; ARGS=--quick tries it
	@$(PY) -m benchmarks.etl $(ARGS)

compare: setup ## every model on one published partition: DT=YYYY-MM-DD DATASET=name MODELS=vql,din,... LENGTHS=200,1000 SEEDS=7,8,9 CONFIG=default
	@$(PY) -m evaluation.compare --dataset "$${DATASET:-kuairand_simulated}" --warehouse "$${LONGVIEW_WAREHOUSE:-$${LONGVIEW_HOME:-var}/warehouse}" --dt "$$DT" --config "$${CONFIG:-default}" \
		$${MODELS:+--models "$$MODELS"} $${LENGTHS:+--lengths "$$LENGTHS"} $${SEEDS:+--seeds "$$SEEDS"} $(ARGS)

claims: setup ## every claim of the method on one page (var/claims/index.html); what benchmarks/results/claims holds is not measured again
	@$(PY) -m benchmarks.claims $(ARGS)

validate: setup ## look at one stage of a partition, change nothing: STAGE=events DT=YYYY-MM-DD DATASET=name ARGS="--attempt A --json"
	@$(PY) -m etl.quality.judge.check --dataset "$${DATASET:-kuairand_simulated}" --warehouse "$${LONGVIEW_WAREHOUSE:-$${LONGVIEW_HOME:-var}/warehouse}" \
		--dt "$$DT" --stage "$${STAGE:-events}" $(ARGS)

let-through: setup ## let a partition that a gate stopped through, once: STAGE=events DT=YYYY-MM-DD DATASET=name REASON="why" BY=name
	@$(PY) -m etl.quality.judge.pass_once --dataset "$${DATASET:-kuairand_simulated}" --warehouse "$${LONGVIEW_WAREHOUSE:-$${LONGVIEW_HOME:-var}/warehouse}" \
		--dt "$$DT" --stage "$$STAGE" --reason "$$REASON" $${BY:+--by "$$BY"} $(ARGS)

release: setup ## by hand: ACTION=rollback, ACTION=promote VERSION=N, ACTION=refuse VERSION=N, ACTION=list; DATASET=name REASON="why" BY=name
	@$(PY) -m evaluation.release.by_hand "$$ACTION" --dataset "$${DATASET:-kuairand_simulated}" --warehouse "$${LONGVIEW_WAREHOUSE:-$${LONGVIEW_HOME:-var}/warehouse}" \
		--runs "$${LONGVIEW_RUNS:-$${LONGVIEW_HOME:-var}/runs}" $${VERSION:+--version "$$VERSION"} --reason "$$REASON" $${BY:+--by "$$BY"} $(ARGS)

reproduce: setup ## train a registered version again from its tags alone, and print the same metrics: VERSION=N DATASET=name
	@$(PY) -m evaluation.release.reproduce --dataset "$${DATASET:-kuairand_simulated}" --warehouse "$${LONGVIEW_WAREHOUSE:-$${LONGVIEW_HOME:-var}/warehouse}" \
		--version "$$VERSION" $(ARGS)

prune: setup ## remove what is no longer current and as old as the definition says: DATASET=name; ARGS=--dry-run shows it with sizes
	@$(PY) -m evaluation.prune --dataset "$${DATASET:-kuairand_simulated}" --warehouse "$${LONGVIEW_WAREHOUSE:-$${LONGVIEW_HOME:-var}/warehouse}" \
		--runs "$${LONGVIEW_RUNS:-$${LONGVIEW_HOME:-var}/runs}" --reports "$${LONGVIEW_REPORTS:-$${LONGVIEW_HOME:-var}/reports}" $(ARGS)

lint: setup ## ruff (rules and format) and mypy
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

up: setup ## start Airflow and MLflow in the background and say where they are
	@$(PY) -m infra.local.stack up

down: ## stop what `make up` started
	@if [ -x $(PY) ]; then $(PY) -m infra.local.stack down; else echo "nothing was running"; fi

backup: setup ## copy the databases of Airflow and MLflow to var/backups/<time>, while they work or not; KEEP=7 newest stay
	@$(PY) -m infra.local.database backup --keep "$${KEEP:-7}"

restore: setup ## put a backup in place of the databases: FROM=var/backups/<time>; after make down
	@$(PY) -m infra.local.database restore "$$FROM"

# Compiled from nothing: an existing torch pin would make uv prefer the CUDA build and pin its 20 companions.
lock: ## compile requirements.txt from pyproject.toml (needs uv); no index address, no local build of torch
	@UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" uv pip compile pyproject.toml --extra dev --python-version 3.11 \
		--no-header --no-emit-index-url --no-emit-find-links --quiet > .requirements.new
	@sed 's/^\(torch==[0-9.]*\)+cpu/\1/' .requirements.new > requirements.txt && rm .requirements.new

clean: down ## delete what runs and tests wrote (var/, caches); .venv stays
	rm -rf var .pytest_cache .hypothesis .mypy_cache .ruff_cache spark-warehouse metastore_db derby.log
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
