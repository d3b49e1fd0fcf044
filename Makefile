# Everything a person or a build machine runs. `make demo` and `make test` set up by themselves.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A relative store path or a foreign cluster must not change what tests see.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-cluster e2e check format bench validate chaos clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cpu,demo,dev]'
	touch $@

demo: $(STAMP)            ## the main job on real data, into runs/demo
	$(BIN)/python launch/demo.py

test: $(STAMP)            ## every test that needs no cluster and no browser
	$(BIN)/python -m pytest -m "not cluster and not e2e" -n auto --maxprocesses=4 --dist worksteal --durations=10

test-cluster: $(STAMP)    ## tests that start their own Ray head, job server or S3 server
	$(BIN)/python -m pytest -m "cluster and not e2e" --durations=10

e2e: $(STAMP)             ## the page in a real browser; as root, Debian's Chromium is installed if there is none
	command -v chromium || test "$$(id -u)" != 0 || \
		(apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium)
	$(BIN)/python -m pytest -m e2e --durations=10

check: $(STAMP)           ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)           ## benchmarks, as ratios inside one run
	$(BIN)/python launch/validate.py collect

validate: $(STAMP)        ## every experiment at full size, resumable, then the README's tables
	$(BIN)/python launch/validate.py all
	$(BIN)/python launch/validate.py --tables

chaos: $(STAMP)           ## whatever fails on the way, a run ends as an undisturbed one; as root also a small disk and two hosts
	$(BIN)/python launch/validate.py chaos

clean:
	rm -rf $(VENV) runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
