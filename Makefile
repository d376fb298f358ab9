# Two commands set everything up: `make train` and `make test`. Each makes .venv on first use.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python

# Pages of 2 MiB for what computes on CPU (docs/PERFORMANCE.md); other C libraries do not read it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help train test chaos endurance test-slow test-torch test-eval test-newest test-tpu-compile test-gpu-compile test-browser test-wandb test-site site pods gpu-pods gpu-report check format benchmark programs peers curves lock hashes clean

help:
	@echo "make train      train a tiny MoE++ model and its vanilla twin on real text, and compare them"
	@echo "make test       the quick tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make chaos      breaks real runs, some 640 times: kills, damaged files, full disks, lost processes; hours"
	@echo "make endurance  memory, open files and threads over 10,000 steps, texts and questions: minutes"
	@echo "make test-torch  the tests against PyTorch and transformers: installs both"
	@echo "make test-eval  the tests against the lm-evaluation-harness: installs it, and PyTorch"
	@echo "make test-newest  the quick tests with the newest JAX there is for this Python"
	@echo "make test-tpu-compile  compile for TPU pods, which need not be there: ten minutes"
	@echo "make test-gpu-compile  compile for NVIDIA GPUs, which need not be there: ten minutes"
	@echo "make test-browser  the routing page in Chromium, which has to be there (Debian: apt install chromium)"
	@echo "make test-wandb  the tests against Weights & Biases, offline: installs its package"
	@echo "make site       the documentation, to build/site: runs the tutorial, some minutes"
	@echo "make test-site  builds it, and follows every link in it"
	@echo "make pods       compile the paper's models for 8 to 4,096 TPU chips, which need not be there"
	@echo "make gpu-pods   compile the 0.6B and the 7B model for 8 and 64 GPUs, which need not be there"
	@echo "make gpu-report  on a machine with GPUs: is it right, and how fast beside theory; ten minutes"
	@echo "make check      lint and format checks"
	@echo "make format     mend what they find, where it can be mended"
	@echo "make benchmark  time the layer, a step by part, and decoding, against their limits and a vanilla MoE"
	@echo "make peers      the layer beside those of transformers, PyTorch and JAX: installs both"
	@echo "make curves     how time, memory and operations grow with tokens, experts, choices, width"
	@echo "make programs   write down what the compiler makes of fixed layers, for make test to hold"
	@echo "make lock       pin what pyproject.toml asks for: requirements.txt, requirements/*.txt"
	@echo "make hashes     the image's lists, with hashes: requirements/image/*.txt; a part of make lock"

.venv/run: requirements.txt pyproject.toml
	@echo "setting up .venv with $(PYTHON): about a minute, 1.2 GB"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moepp_jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

.venv/dev: .venv/run requirements/dev.txt
	@echo "adding what the tests need"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@

# Beside the other packages, not among them: JAX would look for a TPU whenever it starts.
.venv/tpu: .venv/dev requirements/tpu.txt
	@echo "adding the TPU compiler"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
	  $$(grep '^libtpu==' requirements/tpu.txt)
	@touch $@

# Beside the other packages too: what XLA for CUDA needs to compile, and cuDNN, without whose version
# JAX does not ask for its attention.
.venv/gpu: .venv/dev requirements/cuda.txt
	@echo "adding the compiler for NVIDIA GPUs: 940 MB to fetch, 1.7 GB"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
	  $$(grep -E '^(jax-cuda12-pjrt|jax-cuda12-plugin|nvidia-cuda-nvcc-cu12|nvidia-cudnn-cu12)==' requirements/cuda.txt)
	@touch $@

train: .venv/run
	$(PY) -m experiments.twins --config=tiny --workdir=runs/tiny

# Neighbours share fixtures and compiled programs: each process gets a run of them, then steals.
test: .venv/dev
	$(PY) -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

test-slow: .venv/dev
	$(PY) -m pytest -m slow

# Root alone can mount the small disks that it fills.
CHAOS ?= --kills 20
chaos: .venv/dev
	$(PY) -m tests.chaos $(CHAOS) --json tests/chaos/results.json --page docs/FAULTS.md

# Runs the harness too, which its own file of requirements installs.
endurance: .venv/dev requirements/eval.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/eval.txt
	$(PY) -m benchmarks.endurance --json benchmarks/results/endurance.json --figure benchmarks/results/endurance

test-torch: .venv/dev requirements/hf.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/hf.txt
	$(PY) -m pytest -m torch

test-eval: .venv/dev requirements/eval.txt requirements/hf.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/eval.txt -r requirements/hf.txt
	$(PY) -m pytest -m harness

test-tpu-compile: .venv/tpu
	PYTHONPATH=.venv/tpu $(PY) -m pytest -m tpu_compile tests/tpu

test-gpu-compile: .venv/gpu
	PYTHONPATH=.venv/gpu $(PY) -m pytest -m gpu_compile tests/gpu

test-browser: .venv/dev
	$(PY) -m pytest -m browser -s tests/browser

test-wandb: .venv/dev requirements/wandb.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/wandb.txt
	$(PY) -m pytest -m wandb

.venv/docs: .venv/run requirements/docs.txt
	@echo "adding what the site is built with"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	@touch $@

# Warnings are errors (website/mkdocs.yml); the variable is about a notice of the theme's.
site: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --config-file website/mkdocs.yml
	@echo "build/site/index.html"

test-site: .venv/dev .venv/docs
	$(PY) -m pytest -m site

# Not what is pinned but what is newest for this Python, in an environment of its own.
test-newest: .venv/run
	@test -x .venv/newest/bin/python || $(PYTHON) -m venv .venv/newest
	@.venv/newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	  --upgrade-strategy eager '.[dev]'
	@.venv/newest/bin/python -m pip list 2>/dev/null | grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint) '
	.venv/newest/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

pods: .venv/tpu
	PYTHONPATH=.venv/tpu $(PY) -m experiments.run pods step_time step_changes --scale=paper

# The plugin would look for a card, and be of no use when there is none.
gpu-pods: .venv/gpu
	JAX_PLATFORMS=cpu PYTHONPATH=.venv/gpu $(PY) -m experiments.run gpus --scale=paper

# Installs nothing: for a machine that reaches no index, with the project and jax[cuda12] there.
GPU_REPORT ?= runs/gpu_report
gpu-report:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m benchmarks.gpu_report --out=$(GPU_REPORT)

check: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: .venv/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

benchmark: .venv/run
	$(PY) -m benchmarks.layer --models 0.6B 1B 2B 7B --json benchmarks/results/layer.json
	$(PY) -m benchmarks.step --json benchmarks/results/step.json --figure benchmarks/results/step
	$(PY) -m benchmarks.decode --json benchmarks/results/decode.json
	$(PY) -m benchmarks.variable --json benchmarks/results/variable.json
	$(PY) -m benchmarks.data --json benchmarks/results/data.json
	$(PY) -m benchmarks.checksums --json benchmarks/results/checksums.json

# What is pinned stays so, where it can; requirements/held.in says what must not be newer.
LOCK := $(PY) -m piptools compile --quiet --no-header --no-annotate --strip-extras --allow-unsafe \
  --no-emit-index-url --no-emit-find-links --no-build-isolation pyproject.toml
lock: .venv/dev
	$(LOCK) --constraint requirements/held.in --output-file requirements.txt
	agree="--constraint requirements.txt"; for extra in cloud cuda dev docs eval hf tpu wandb; do \
	  $(LOCK) $$agree --extra $$extra --output-file requirements/$$extra.txt; \
	  agree="$$agree --constraint requirements/$$extra.txt"; done
	$(MAKE) hashes

# The image's files: the same versions, each with the index's hashes of its files (nothing is
# fetched), for the Linux of TPU and GPU machines; cuda.txt and tpu.txt have what they add to
# cpu.txt, build.txt what builds the one package that has no wheel.
HASHES := $(PY) -m uv pip compile --quiet --no-deps --no-header --no-annotate --generate-hashes \
  --python-version 3.11 --python-platform x86_64-manylinux_2_31
hashes: .venv/dev
	grep -E '^(packaging|setuptools|wheel)==' requirements/dev.txt | $(HASHES) - --output-file requirements/image/build.txt
	$(HASHES) requirements.txt requirements/cloud.txt --output-file requirements/image/cpu.txt
	for platform in cuda tpu; do \
	  $(HASHES) requirements/$$platform.txt --output-file requirements/image/$$platform.txt \
	    $$(sed -n 's/^\([^ =]*\)==.*/--no-emit-package \1/p' requirements/image/cpu.txt); done

# What `make test` compares the compiler's numbers with: after a gain, or a loss that is wanted.
programs: .venv/dev
	$(PY) -m tests.programs

peers: .venv/dev requirements/hf.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/hf.txt
	$(PY) -m benchmarks.peers --json benchmarks/results/peers.json --figure benchmarks/results/peers

curves: .venv/run
	$(PY) -m benchmarks.curves --clock --json benchmarks/results/curves.json --figure benchmarks/results/curves

clean:
	rm -rf .venv runs data
