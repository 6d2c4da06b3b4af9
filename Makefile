# make train   set up, align the pocket model with DDIM-InPO, evaluate it, write a report
# make test    set up, run the tests
# make kernels set up, compile every kernel for sm_80, sm_90 and sm_100: registers, spills, widths; needs no GPU
# make bench   set up, time the kernels (without a GPU only their CPU paths)
# make study   set up, five methods on the pocket world, two training seeds, few steps: a table with intervals
# make gpu     what wants a GPU: kernel tests, kernel benchmarks, step benchmark, in slices

PYTHON ?= python3
BIN := .venv/bin
PROCESSES ?= 2

.PHONY: train test lint format pocket kernels bench study gpu setup clean audit

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "inpo-fast needs Python >= 3.11: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch -e ".[dev]"
	touch .venv/ready

train: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m inpo_fast.train --config configs/pocket.yaml --overwrite

test: .venv/ready
	$(BIN)/python -m pytest tests -n 2 --dist worksteal -q
	$(BIN)/python -m pytest bench --check -n 2 -q

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pocket: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m inpo_fast.pocket.build

kernels: .venv/ready
	$(BIN)/python -m bench.compile_kernels $(ARGS)

bench: .venv/ready
	$(BIN)/python -m pytest bench --benchmark-only

study: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.study short $(ARGS)

# on a machine with a GPU: installs nothing, goes on where the last call stopped; make gpu ARGS="--budget-minutes 30"
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu $(ARGS)

clean:
	rm -rf .venv runs build *.egg-info

# known weaknesses of what is installed; asks a server
audit: .venv/ready
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/pip-audit -r constraints.txt --no-deps
