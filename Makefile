# Each target sets up .venv by itself; `make PYTHON=python3.12 test` picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo pictures test test-machines lint docs links package bench bench-fast gpu clean

demo: $(STAMP)
	$(BIN)/hessfunc analyze digits --out demo

# The pictures of docs/gallery.md.
pictures: $(STAMP)
	.ci/pictures

test: $(STAMP)
	$(BIN)/pytest -q -n auto --dist worksteal

# All of them with the rounding, the threads and the load of other machines, one after another;
# `make test-machines SETTING=busy` takes one of them.
test-machines: $(STAMP)
	.ci/machines $(SETTING)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A warning is an error, and so is a link within the site that leads nowhere.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Those to the outside, too, which needs a network.
links: docs
	$(BIN)/linkchecker --no-status --check-extern site/index.html

package: $(STAMP)
	.ci/package

# The most important cells in 25 minutes; `python -m bench.speed` measures all of them.
bench: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.speed --again --minutes 25

bench-fast: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.speed --again --fast

# All checks that need a GPU, in at most 8 minutes. $(PYTHON) is used as it is if its torch sees one.
gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	  $(PYTHON) -m bench.gpu; \
	else \
	  $(MAKE) $(STAMP) && $(BIN)/python -m bench.gpu; \
	fi

clean:
	rm -rf .venv demo site build dist .pytest_cache .mypy_cache .ruff_cache
	find hessfunc tests bench -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hessfunc needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11"; \
	  exit 1; }
	@echo "setting up .venv (once, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev,docs]'
	@touch $@
