# make demo   the main job on real data, shown         make test-gpu  GPU tests, in the environment that is active
# make test   every test that needs no GPU             make bench     the benchmarks on this CPU
# make lint   format, lint and types                   make clean     remove what the others made
# make docs   the documentation, docs/_build/html/index.html
# make resolve   whether the extras for GPUs can be installed
# make test-dask   the tests of lazy/ on the newest and the oldest Dask that setup.cfg claims
# make test-kills   commands that are killed at random moments, for many rounds
# make fuzz   damaged files, for a minute: make fuzz SECONDS=600 SEED=7
# make test-curator   the tests in NeMo Curator's own pipelines, on the CPU
#
# Each target that needs it creates .venv first: Python 3.11 to 3.14 is all a machine must have. That of test-curator is
# .venv-curator: NeMo Curator brings Ray and a hundred more packages.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
CURATOR := .venv-curator
OLDEST := .venv-dask

.PHONY: demo test lint docs fuzz test-gpu test-curator test-dask test-kills resolve bench install clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py demo

# Several processes, each with one of torch's threads: more would wait for each other on the same cores. The examples of
# a page are parts of one program, so a process takes whole files.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" \
		--numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# It prints what went wrong, and the number that repeats it.
SECONDS ?= 60
SEED ?= 0

fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

# Warnings are errors, and so is a link to a page, a heading or a function that is not there.
docs: $(INSTALLED)
	$(BIN)/sphinx-build -W -n --keep-going --quiet docs docs/_build/html

test-kills: $(INSTALLED)
	KILL_ROUNDS=10 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cli/test_kills.py

# The newest is that of constraints.txt. The oldest comes with the oldest pandas.
test-dask: $(INSTALLED) $(OLDEST)/.installed
	$(BIN)/python -m pytest -m "not gpu" tests/lazy
	$(OLDEST)/bin/python -m pytest -m "not gpu" tests/lazy

$(OLDEST)/.installed: setup.cfg constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -vE '^(dask|distributed|pandas|pandas-stubs|pyarrow)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
		--editable '.[test]' 'dask[dataframe,distributed]==2026.1.1' 'pandas==2.3.*' 'pyarrow==23.*'
	touch $@

# Those of late streams need a torch that shares cuDF's memory: it must not have used CUDA before.
test-gpu:
	python -m pytest -m gpu tests/test_cudf.py -k TestLaggingStreams
	python -m pytest -m gpu tests -k "not TestLaggingStreams"

# The extras cu12 and cu13, from package metadata alone.
resolve:
	test -x .venv-resolve/bin/uv || { $(PYTHON) -m venv .venv-resolve && .venv-resolve/bin/pip install --quiet uv; }
	.venv-resolve/bin/python .ci/resolve.py

# NeMo Curator starts the program 'ray', which must be on PATH.
test-curator: $(CURATOR)/.installed
	PATH="$(CURDIR)/$(CURATOR)/bin:$$PATH" $(CURATOR)/bin/python -m pytest tests/curator dask_semdedup/curator.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/search.py --device cpu
	$(BIN)/python benchmarks/end_to_end.py

install: $(INSTALLED)

$(INSTALLED): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[test,docs,notebooks,readers]'
	touch $@

$(CURATOR)/.installed: setup.cfg constraints.txt
	test -x $(CURATOR)/bin/python || $(PYTHON) -m venv $(CURATOR)
	$(CURATOR)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[curator]' nemo-curator==1.4.0 hypothesis pytest
	touch $@

clean:
	rm -rf .venv .venv-resolve $(CURATOR) $(OLDEST) demo build docs/_build docs/api/generated .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
