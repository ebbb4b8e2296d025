# Everything happens inside .venv: no sudo, nothing outside this folder. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# XLA's CPU backend takes its large temporaries from malloc, and glibc by default maps them anew and unmaps them in every
# training step. Kept on the heap, in huge pages and one arena, a step is about 20 % faster. Other C libraries ignore this.
export GLIBC_TUNABLES ?= glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1

# Stamp files: an environment is made once per Python version, and filled again only when its list of packages changed.
PYTHON_STAMP := $(VENV)/.python-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
PACKAGE_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: quickstart test test-slow mutations lint docs format clean

quickstart: $(PACKAGE_STAMP)
	$(BIN)/cdlm quickstart

test: $(TEST_STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(TEST_STAMP)
	CDLM_FULL=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# Breaks a copy of the code in 30 places and says which of them the fast tests notice.
mutations: $(TEST_STAMP)
	$(BIN)/python tests/mutations.py

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ with the API reference, under site/; a broken link fails.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site .cache .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(PYTHON_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cdlm_jax needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1): try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(PACKAGE_STAMP): $(PYTHON_STAMP) pyproject.toml requirements.txt
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(DOCS_STAMP): $(PACKAGE_STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# reasoning-gym needs a C compiler: without it the tests of its two tasks skip.
$(TEST_STAMP): $(PACKAGE_STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[test,eval,lm-eval]'
	$(BIN)/python -m pip install --quiet --editable '.[reasoning]' || echo "reasoning-gym could not be installed: its tests will skip"
	touch $@
