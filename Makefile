# Every target but help, docs, test-lowest, package, image and clean makes .venv first; that takes no time when nothing changed.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vllm test-lowest check check-lint docs package image fuzz chaos bench clean

BIN := .venv/bin

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make .venv from the lock and install loracache into it
	@PYTHON="$(PYTHON)" scripts/setup.sh

demo: setup ## See the cache work: a small model, a daemon, a hit
	@$(BIN)/python examples/demo.py

test: setup ## Run every test: fast ones first, then those with a real vLLM
	@scripts/test.sh all

test-vllm: setup ## The end-to-end tests on other releases: make test-vllm VERSIONS="0.29.0 0.31.0"
	@scripts/test_vllm.sh $(VERSIONS)

test-lowest: ## The fast tests with the lowest version of each dependency that pyproject.toml declares
	@PYTHON="$(PYTHON)" scripts/test_lowest.sh

check: check-lint ## Lint, types and the fast tests (minutes)
	@scripts/test.sh fast

check-lint: setup ## Lint, formatting and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: ## Build the documentation into site/; a warning, or anything loaded from elsewhere, fails it
	@PYTHON="$(PYTHON)" scripts/docs.sh

package: ## Build wheel and sdist into dist/, install each into an environment of its own, and use it
	@PYTHON="$(PYTHON)" scripts/package.sh

image: ## Build the daemon's image with docker, start it, and stop it
	@scripts/image.sh

fuzz: setup ## 20,000 calls of REST made up from its OpenAPI document (minutes)
	@LORACACHE_FUZZ_CALLS=20000 $(BIN)/pytest tests/stress/test_rest_fuzz.py

chaos: setup ## Faults by the second under load, mutated frames, made-up calls: make chaos MINUTES=15 (SEED=n: the same again)
	@$(BIN)/python tests/stress/chaos/chaos.py --minutes $(or $(MINUTES),15) $(if $(SEED),--seed $(SEED)) --report chaos.json

bench: setup ## Measure, and print what was measured on what
	@$(BIN)/python benchmarks/run.py

clean: ## Remove .venv and everything built or cached
	rm -rf .venv .venv-docs .venv-lowest build dist site *.egg-info chaos.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
