# make demo, make test: each sets up what it needs first, through make env.
#
#   make env                          builds .venv: pinned packages (constraints.txt) and PyTorch3D
#   make test PYTHON=/path/to/python  uses that Python's environment instead, for instance one with a CUDA torch and a
#                                     compiled PyTorch3D: whatever it has is kept at its version, only missing packages are added;
#                                     the same holds for a .venv that was there before
#   make test PYTEST="-k fusion"      passes options on to pytest; "-n 0" runs all in one process
#   make demo DEMO="--help"           passes options on to the demo
#
# The first python3 of 3.11 or newer makes .venv; `make env PYTHON3=python3.12` chooses another, `VENV=dir` another folder.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON3 ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
    $(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
PYTORCH3D := 0.7.4
EXTRAS := dev,video,mine

MADE_HERE := $(VENV)/made_by_make
ifneq ($(wildcard $(VENV)/bin/python),)
ifeq ($(wildcard $(MADE_HERE)),)
PYTHON ?= $(VENV)/bin/python
endif
endif

ifdef PYTHON
PY := $(PYTHON)
PURELIB := $(shell "$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
ifeq ($(PURELIB),)
$(error PYTHON=$(PYTHON) does not run)
endif
STAMP := $(PURELIB)/co3d_ensemble.stamp
else
PY := $(VENV)/bin/python
STAMP := $(VENV)/co3d_ensemble.stamp
endif

# This checkout comes first, also where the environment was installed from another one.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL := "$(PY)" -m pip install --no-build-isolation

.PHONY: help env demo test bench lint clean
help:
	@echo "make demo    generate a small sequence, train on it, render, score, export (about 5 minutes on 2 cores)"
	@echo "make test    the tests"
	@echo "make bench   seconds per training step, ours and Implicitron's"
	@echo "make lint    ruff"
	@echo "make env     only the environment: .venv, or PYTHON=/path/to/python to use an existing one"
	@echo "make clean   remove .venv and caches"

env: $(STAMP)

demo: env
	"$(PY)" launch/demo.py $(DEMO)

# Test tensors are small, and tests start processes of their own: one thread each is the fastest. A worker per core, which imports
# all of PyTorch3D for itself, so no more than 8; one that is done takes half of what another has left, which keeps most of a
# file's tests, and with them its fixtures, in one place.
test: export OMP_NUM_THREADS ?= 1
test: env
	"$(PY)" -m pytest -n logical --maxprocesses 8 --dist worksteal $(PYTEST)

bench: env
	"$(PY)" benchmarks/nerf_step.py $(BENCH)

lint: env
	"$(PY)" -m ruff check .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifdef PYTHON
# Every version found becomes a constraint, so pip can add packages but replace none.
$(STAMP): Makefile setup.cfg pyproject.toml
	@"$(PY)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PYTHON=$(PYTHON) is older than 3.11")'
	@"$(PY)" -c 'import torch' || { echo "PYTHON=$(PYTHON) has no torch: install one there, or let make build a new .venv (no PYTHON, no .venv)"; exit 1; }
	@echo "adding missing packages to the environment of $(PYTHON)"
	@"$(PY)" -m pip list --format=freeze | grep -v -i '^co3d.ensemble' > "$(PURELIB)/co3d_ensemble.found"
	$(PIP_INSTALL) -c "$(PURELIB)/co3d_ensemble.found" -qq setuptools wheel
	$(PIP_INSTALL) -c "$(PURELIB)/co3d_ensemble.found" -e ".[$(EXTRAS)]"
	@rm "$(PURELIB)/co3d_ensemble.found"
	@$(install_pytorch3d)
	@touch "$@"
else
$(STAMP): Makefile setup.cfg pyproject.toml constraints.txt
	@[ -n "$(PYTHON3)" ] || { echo "co3d_ensemble needs Python 3.11 or newer; found $$(python3 --version 2>&1 || echo none)." \
	    "Name one: make env PYTHON3=/path/to/python3.11"; exit 1; }
	@echo "building $(VENV) with $$($(PYTHON3) --version): a few minutes the first time"
	@mkdir -p "$(VENV)" && touch "$(MADE_HERE)"
	@"$(PY)" -m pip --version > /dev/null 2>&1 || "$(PYTHON3)" -m venv "$(VENV)" || \
	    { echo "python3 -m venv failed: on Debian and Ubuntu it needs the package python3-venv"; exit 1; }
	@$(forget_half_installed)
	$(PIP_INSTALL) -qq -c constraints.txt setuptools wheel
	$(PIP_INSTALL) -c constraints.txt -e ".[$(EXTRAS)]"
	@$(install_pytorch3d)
	@touch "$@"
endif

# pip writes INSTALLER after a package's files; an interrupted package has none and would count as installed.
define forget_half_installed
for info in "$(VENV)"/lib/python*/site-packages/*.dist-info; do \
    [ ! -d "$$info" ] || [ -f "$$info/INSTALLER" ] || rm -rf "$$info"; \
done
endef

# The index has PyTorch3D only as macOS wheels; their Python files run anywhere, and co3d_ensemble.plugin.compat stands in
# for the compiled part. Unpacked beside its place and renamed into it, so that what is there is whole.
define install_pytorch3d
"$(PY)" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("pytorch3d") is None)' || { \
    echo "no PyTorch3D here: installing the Python files of $(PYTORCH3D)"; \
    lib="$$("$(PY)" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"; \
    rm -rf "$$lib/pytorch3d.incoming" "$$lib"/pytorch3d-*.dist-info; \
    "$(PY)" -m pip install -qq --no-deps --only-binary=:all: --platform macosx_10_9_x86_64 --python-version 3.10 \
        --implementation cp --abi cp310 --target "$$lib/pytorch3d.incoming" pytorch3d==$(PYTORCH3D); \
    mv "$$lib"/pytorch3d.incoming/pytorch3d-*.dist-info "$$lib"/; \
    mv "$$lib/pytorch3d.incoming/pytorch3d" "$$lib"/; \
    rm -rf "$$lib/pytorch3d.incoming"; \
}; \
"$(PY)" -c 'from co3d_ensemble.plugin.compat import install; standing_in = install(); import torch, pytorch3d; \
print("environment ready: torch", torch.__version__ + ", PyTorch3D", pytorch3d.__version__, "(Python files only)" if standing_in else "(compiled)")'
endef
