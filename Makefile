# make demo   from a clone to a trained model
# make test   the whole test suite
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin

.PHONY: help demo compare test lint tiny clean
help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

demo: .venv/installed  ## train the embedded tiny model and show what became of it
	$(BIN)/python -m sft_recipes

compare: .venv/installed  ## train every recipe on the tiny model and show them side by side, in under ten minutes
	$(BIN)/python benchmarks/compare.py

test: .venv/installed-test  ## run the test suite
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/installed-test  ## check style, format, and which way imports point
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

tiny: .venv/installed  ## build the embedded tiny model again, in about ten minutes
	$(BIN)/python tools/tiny/build.py

clean:  ## remove the environment
	rm -rf .venv

# torch first and pinned: a bare torch may bring gigabytes of another build
.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	touch $@

.venv/installed: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@
