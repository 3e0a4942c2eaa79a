# One way in: `make demo` from a fresh clone. Everything lives in .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete

.PHONY: env demo test browser lint types docs speed check clean

env: $(STAMP)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "TailSeg needs Python 3.11 or newer;" \
	  "$(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make env PYTHON=python3.12"; exit 1; }
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing TailSeg and what it needs into .venv, at the versions of constraints.txt"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "environment ready: $(BIN)/tailseg --help"

demo: env
	$(BIN)/tailseg demo --out demo
	@echo "the results lie in $(CURDIR)/demo"

test: env
	$(BIN)/python -m pytest -n auto --dist loadfile

browser: env
	$(BIN)/python -m pytest -m browser

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: env
	$(BIN)/basedpyright

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the documentation lies in $(CURDIR)/site/index.html"

# PEERS='--peer dhc=PATH' puts the released code of a paper beside ours
speed: env
	$(BIN)/python benchmarks/speed $(PEERS)

check: lint types test docs browser

clean:
	@echo "removing caches, built packages, demo/ and site/; the environment stays (rm -rf .venv)"
	rm -rf .pytest_cache .ruff_cache build dist demo site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
