# make train   set up, align the pocket model with DDIM-InPO, evaluate it, write a report
# make test    set up, run the tests
# make setup   .venv with all they need, by uv where it is installed, else pip; says first how large it will be.
#              TORCH=cpu PyTorch without CUDA; INSTALLER=pip or uv; PYTHON=python3.12
# make kernels set up, compile every kernel for sm_80, sm_90 and sm_100: registers, spills, widths; needs no GPU
# make bench   set up, time the kernels (without a GPU only their CPU paths)
# make study   set up, five methods on the pocket world, two training seeds, few steps: a table with intervals
# make gpu     what wants a GPU: step benchmark, kernel tests, kernel benchmarks, in slices, the most telling first
# make wheelhouse FOR=3.12 HAS=freeze.txt   what a machine without a network lacks, as wheels, in build/wheelhouse.
#              freeze.txt: `python3 -m pip list --format=freeze` there; FOR its Python; EXTRAS=gpu,data; PLATFORM=aarch64
# make gpu-rehearse   make gpu's tasks on the CPU, with a GPU machine's packages (bench/gpu-machine.txt, or HAS=)

PYTHON ?= python3
TORCH ?=
INSTALLER ?=
BIN := .venv/bin
TORCHRUN := $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node
PROCESSES ?= 2
# with .venv's Python where there is one
HERE = $(if $(wildcard .venv/ready),$(BIN)/python,$(PYTHON))
EXTRAS ?= bench
PLATFORM ?= x86_64
FOR ?=
HAS ?=

.PHONY: train test lint format pocket kernels bench study gpu gpu-rehearse wheelhouse setup clean audit resolve

# what was set up in another place, for another TORCH, or has lost its Python is set up anew
$(shell test -x $(BIN)/python && grep -qxF 'place $(CURDIR)' .venv/ready 2>/dev/null || rm -f .venv/ready)
$(if $(TORCH),$(shell grep -qxF 'torch $(TORCH)' .venv/ready 2>/dev/null || rm -f .venv/ready))

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo 'setup: there is no $(PYTHON); install Python 3.11 or newer (apt install python3 python3-venv), or name one: make PYTHON=python3.12 …' >&2; exit 1; }
	@$(PYTHON) install.py --torch '$(TORCH)' --installer '$(INSTALLER)'

train: .venv/ready
	OMP_NUM_THREADS=1 $(TORCHRUN) $(PROCESSES) -m inpo_fast.train --config configs/pocket.yaml --overwrite

test: .venv/ready
	$(BIN)/python -m pytest tests bench --check -n 2 --dist worksteal -q

lint: .venv/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: .venv/ready
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

pocket: .venv/ready
	OMP_NUM_THREADS=1 $(TORCHRUN) $(PROCESSES) -m inpo_fast.pocket.build --overwrite

kernels: .venv/ready
	$(BIN)/python -m bench.kernels.compile $(ARGS)

bench: .venv/ready
	$(BIN)/python -m pytest bench --benchmark-only

study: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.study short $(ARGS)

# on a machine with a GPU: installs nothing, goes on where the last call stopped; make gpu ARGS="--budget-seconds 1800"
gpu:
	$(HERE) -m bench.gpu --plan all $(ARGS)

wheelhouse:
	@$(HERE) wheelhouse.py --for '$(FOR)' --platform '$(PLATFORM)' --extras '$(EXTRAS)' --has '$(HAS)'

# in an environment of its own, made once; HAS=constraints-oldest.txt rehearses with the oldest versions
gpu-rehearse:
	@$(HERE) -m bench.gpu_machine --for '$(or $(FOR),3.12)' --has '$(or $(HAS),bench/gpu-machine.txt)' --extras '$(EXTRAS)' --torch '$(TORCH)'
	build/gpu-machine/bin/python -m bench.gpu --rehearse $(ARGS)

clean:
	rm -rf .venv runs build *.egg-info

# do the constraints resolve for anybody, against the package index alone? asks a server
resolve: .venv/ready
	$(BIN)/python .ci/resolve.py $(ARGS)

# known weaknesses of what constraints.txt pins; asks a server. Green only when every version was looked up
audit: .venv/ready
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/python .ci/audit.py $(ARGS)
