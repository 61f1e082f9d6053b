# Two commands set up everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test unit ray faults screens cluster-test lint bench clean

.venv/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/antidote run demo

test: unit ray

unit: .venv/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not ray and not faults and not browser'

ray: .venv/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ray

# Who dies in which phase, on a cluster of several raylets; rewrites the table of docs/faults.md.
faults: .venv/.ready
	ANTIDOTE_FAULTS_PAGE=docs/faults.md $(BIN)/python -m pytest tests/faults

# A sweep's report, an audit's page and MLflow's comparison in a real Chromium; pictures go to screens/.
screens: .venv/.ready
	ANTIDOTE_SCREENS=screens $(BIN)/python -m pytest -rs tests/browser

# A real `ray up` on machines made of namespaces: root, openssh-server, rsync, minutes.
cluster-test: .venv/.ready
	$(BIN)/python -m pytest -s tests/cluster/on_premise.py

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.ready
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
