# `make setup` makes .venv with the versions of constraints.txt; all else runs in it.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# No warnings of conflicts: those of requirements-nodeps.txt are known, see there.
PIP    := $(PY) -m pip --disable-pip-version-check install --quiet --quiet --no-warn-conflicts
STAMP  := $(VENV)/.setup-done
TSTAMP := $(VENV)/.setup-test-done
# The tests: processes at a time, each computing with one thread; test files are not divided among them.
JOBS   ?= 2
# Threads that wait sleep: those that spin keep the cores from the other process's.
PYTEST  = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
BENCHES := align gallery stages models swap

BVENV   := build/bench-venv

.PHONY: help setup setup-test demo test test-long bench $(addprefix bench-,$(BENCHES)) bench-engine bench-protection bench-judges chaos clean

help:
	@echo "make setup          create .venv (pinned versions; quick when nothing changed)"
	@echo "make demo           set-up, then protect a small archive of generated people, then the report"
	@echo "make test           set-up, then the tests but the long ones (10 minutes on 2 cores)"
	@echo "make test-long      set-up, then the long tests: campaigns, large networks (docs/testing.md)"
	@echo "make bench          all benchmarks; one of them: $(addprefix bench-,$(BENCHES))"
	@echo "make bench-engine   the engine beside datatrove and Ray Data (in an environment of their own), planning, nights, overhead"
	@echo "make bench-protection  our profile and attacks on 128 people of LFW (hours; ARGS=\"--people 8\" for a look)"
	@echo "make bench-judges   where a judge's bar lies, from evaluations of development people (ARGS=\"--folder OUT/evaluations\")"
	@echo "make chaos          kill 200 processes of running jobs, resume, and compare what came out"
	@echo "make clean          remove .venv and build"

setup: $(STAMP)

setup-test: $(TSTAMP)

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, \
	$(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(STAMP): requirements.txt requirements-nodeps.txt constraints.txt pyproject.toml | $(PY)
	$(PIP) -c constraints.txt setuptools -r requirements.txt
	$(PIP) --no-deps -r requirements-nodeps.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(TSTAMP): requirements-test.txt $(STAMP)
	$(PIP) -c constraints.txt -r requirements-test.txt
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/scol demo

test: $(TSTAMP)
	$(PYTEST) -m "not long" tests

test-long: $(TSTAMP)
	$(PYTEST) -m long tests

$(addprefix bench-,$(BENCHES)) bench-engine bench-protection bench-judges: bench-%: $(STAMP)
	$(PY) -m pipelines.bench.$* $(ARGS)

bench-engine: $(BVENV)/.done

chaos: $(STAMP)
	$(PY) -m pipelines.bench.chaos $(ARGS)

# One after the other, also under -j: they measure time.
bench: $(STAMP)
	@for name in $(BENCHES); do $(MAKE) --no-print-directory bench-$$name || exit 1; done

$(BVENV)/.done: requirements-bench.txt constraints.txt
	$(PYTHON) -m venv $(BVENV)
	$(BVENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -r requirements-bench.txt
	@touch $@

clean:
	rm -rf $(VENV) build
