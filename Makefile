# make demo   from a clone to a trained model
# make test   the test suite
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN     = $(VENV)/bin
PYTEST  = $(BIN)/python -m pytest -n auto --dist loadfile
# the oldest releases that pyproject.toml allows of the libraries whose fields and hooks we use
OLDEST  = $(shell sed -nE 's/^ *"(trl|transformers|peft|datasets)>=([0-9.]+).*/\1==\2/p' pyproject.toml)

.PHONY: help demo compare test test-all test-faults test-oldest lint tiny clean
help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

demo: $(VENV)/installed  ## train the embedded tiny model and show what became of it
	$(BIN)/python -m sft_recipes

compare: $(VENV)/installed  ## train every recipe on the tiny model and show them side by side, in under ten minutes
	$(BIN)/python benchmarks/compare.py

test: $(VENV)/installed-test  ## run the test suite, with some of the recipes and notebooks
	$(PYTEST)

test-all: $(VENV)/installed-test  ## run all of it: every recipe, every notebook, every fault
	ALL_TESTS=1 ALL_FAULTS=1 $(PYTEST)

test-faults: $(VENV)/installed-test  ## kill runs at every point, damage their checkpoints, fill their disks, and resume them
	ALL_FAULTS=1 $(PYTEST) tests/faults

test-oldest:  ## run it in a second environment, on the oldest trl, transformers, peft and datasets that are allowed
	$(MAKE) test VENV=.venv-oldest PINS='$(OLDEST)'

lint: $(VENV)/installed-test  ## check style, format, and which way imports point
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

tiny: $(VENV)/installed  ## build the embedded tiny model again, in about ten minutes
	$(BIN)/python tools/tiny/build.py

clean:  ## remove the environments
	rm -rf .venv .venv-oldest

# torch first and pinned: a bare torch may bring gigabytes of another build
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' $(PINS)
	touch $@
