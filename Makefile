# Every target does its own set-up: scripts/bootstrap.py holds the logic, docs/install.md explains it.

PYTHON := $(or $(PYTHON),$(shell for p in python3.11 python3 python3.12 python3.13 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done))
MPI = auto
ARGS =
BOOTSTRAP = $(or $(PYTHON),$(error No Python 3.11 on PATH. Install it (apt install python3 python3-venv python3-dev; \
	dnf install python3.11-devel; module load python) or name it: make demo PYTHON=/path/to/python3.11)) \
	scripts/bootstrap.py --mpi $(MPI)

.NOTPARALLEL:
.PHONY: help env demo test lint docs check clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST))
	@echo 'Options: ARGS="for the program"  MPI=pip|system  PYTHON=/path/to/python3.11'

env: ## make .venv: torch, MPI, Horovod, this project (the first time: about 10 minutes, 8 GB)
	@$(BOOTSTRAP)

demo: env ## train on 2 ranks, compressed, then uncompressed, and compare
	@$(BOOTSTRAP) --mpirun 2 .venv/bin/python examples/imagenet_resnet50.py --compare $(ARGS)

test: ## run the tests
	@$(BOOTSTRAP) --tests
	.venv/bin/python -m pytest $(ARGS)

lint: ## check style and types
	@$(BOOTSTRAP) --tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: ## build docs/ as HTML into build/docs, with warnings as errors
	@$(BOOTSTRAP) --docs
	.venv/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs build/docs
	@echo build/docs/index.html

check: lint test ## what continuous integration runs

clean: ## remove .venv and everything that was built here (the cached Horovod stays)
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find hvd_compress -name '*.so' -delete
	find hvd_compress benchmarks examples scripts slurm tests -name __pycache__ -prune -exec rm -rf {} +
