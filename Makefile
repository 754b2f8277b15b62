# Every target sets up what it needs in .venv or .venv-airflow; see .ci/setup.
.DEFAULT_GOAL := help
SHELL := bash

# A Spark of the machine would be used instead of the environment's.
unexport SPARK_HOME
# Some containers set this; each process of Spark or Airflow would then compile thousands of modules again.
unexport PYTHONDONTWRITEBYTECODE
export PYSPARK_PYTHON := $(CURDIR)/.venv/bin/python
run = JAVA_HOME="$$(cat .venv/java-home)" PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: help
help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1/p' Makefile | while read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

.PHONY: setup-demo
setup-demo:
	@.ci/setup demo

.PHONY: setup-dev
setup-dev:
	@.ci/setup dev

.PHONY: setup-bench
setup-bench:
	@.ci/setup bench

.PHONY: setup-airflow
setup-airflow:
	@.ci/setup airflow

.PHONY: demo
demo: setup-demo  ## Generate three markets, score them, publish to Delta, evaluate (DEMO_ARGS="...")
	@$(run) SPARK_SUBMIT_OPTS="-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m" python jobs/demo.py $(DEMO_ARGS)

.PHONY: demo-train
demo-train: setup-dev  ## Train and export a tiny model in minutes, from Korean labels alone, in build/demo_train
	@$(run) python jobs/demo_bundle.py --set work=build/demo_train --set bundle_dir=build/demo_train/bundle \
		--set products_per_market=2000 --set queries_per_market=800

.PHONY: demo-bundle
demo-bundle: setup-dev  ## Train and export the tiny bundle that the demo scores with
	@$(run) python jobs/demo_bundle.py

.PHONY: test
test: setup-dev setup-airflow  ## Run the tests, in two processes (all but those of make test-long; TEST_ARGS="...")
	@$(run) python -m pytest -n 2 --dist loadfile --durations 20 -m "not long" $(TEST_ARGS)

.PHONY: test-long
test-long: setup-dev  ## Run the tests that take a minute or more each and are left out of make test (TEST_ARGS="...")
	@$(run) python -m pytest -m long $(TEST_ARGS)

.PHONY: faults
faults: setup-dev  ## Break nights on a real cluster in every way that is known (TEST_ARGS="...")
	@$(run) python -m pytest tests/faults --fault-table docs/faults.md $(TEST_ARGS)

.PHONY: test-quick
test-quick: setup-dev  ## Run the tests that need no Spark and take seconds
	@$(run) python -m pytest -m "not spark and not slow and not gpu" $(TEST_ARGS)

.PHONY: bench
bench: setup-bench  ## Compare the speed with what else could score, in tests/benchmarks/speed.md (BENCH_ARGS="...")
	@$(run) python tests/benchmarks/speed.py --spark $(BENCH_ARGS)

.PHONY: lint
lint: setup-dev  ## Lint, check format, spelling and types
	@$(run) ruff check
	@$(run) ruff format --check
	@$(run) typos
	@$(run) mypy

.PHONY: docs
docs: setup-dev  ## Show the documentation as a site, while you write it
	@$(run) NO_MKDOCS_2_WARNING=1 mkdocs serve

.PHONY: docs-build
docs-build: setup-dev  ## Build the documentation's site in build/site; any warning fails
	@$(run) NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

.PHONY: format
format: setup-dev  ## Format the code and fix what can be fixed
	@$(run) ruff check --fix-only
	@$(run) ruff format

.PHONY: clean
clean:  ## Remove the environment and everything that was generated
	rm -rf .venv .venv-airflow build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis spark-warehouse metastore_db derby.log
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
