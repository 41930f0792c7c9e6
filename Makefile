# The commands of the project; `make` alone lists them. Each sets up what it needs and no more, in
# a virtual environment of its own, and sets up nothing a second time.

# the Python that makes the environment, 3.11 or later
PYTHON ?= python3
# where the environment lies
VENV ?= .venv
# the package index that torch is taken from; empty: the one pip uses anyway
TORCH_INDEX ?=
# what `make run` continues, and by how many tokens
ifndef PROMPT
define PROMPT
SCENE II. Verona. A garden.

[Enter ROMEO]

ROMEO:
But soft, what light through yonder window breaks?

endef
endif
TOKENS ?= 150
# where `make train` trains a model, and how long: minutes, or nothing for the whole recipe
OUT ?= runs/mini
MINUTES ?=
# test files, and notebooks, run at a time
JOBS ?= 2
# more arguments for JupyterLab, for example LAB_ARGS=--no-browser
LAB_ARGS ?=
# JupyterLab refuses to run as root, which in a container one often is, unless it is told to
AS_ROOT := $(shell [ "$$(id -u)" != 0 ] || echo --allow-root)

export PROMPT
PY := $(VENV)/bin/python
# pip shows what it downloads and how far it is; -qq only where that takes no time.
PIP := $(PY) -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install -c constraints.txt

.PHONY: help run lab reset train check quick test clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make run    generate text from the trained model: FP8, on two ranks (sets up what it needs)"
	@echo "make lab    open the book in JupyterLab"
	@echo "make reset CHAPTER=01   bring a chapter back as it was shipped; yours is kept beside it"
	@echo "make train  train such a model, into OUT=$(OUT); MINUTES=M makes it shorter"
	@echo "make check  lint, format and types of the code, in seconds"
	@echo "make quick  before a commit: check, and the tests that take under two minutes"
	@echo "make test   run all tests, then all notebooks, comparing their outputs"
	@echo "make clean  remove the environment and what Python left behind"
	@echo "Options, with their values: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX)"

run: $(VENV)/.stamp-run
	@echo "==> dsv3 generate assets/dsv3-mini --tp 2 --precision fp8 --temperature 0.8" \
	  "--top-p 0.95 --max-new-tokens $(TOKENS) --prompt ..."
	@$(VENV)/bin/dsv3 generate assets/dsv3-mini --tp 2 --precision fp8 --temperature 0.8 \
	  --top-p 0.95 --max-new-tokens $(TOKENS) --prompt "$$PROMPT"
	@echo "==> the book that builds this model: make lab"

lab: $(VENV)/.stamp-lab
	@echo "==> JupyterLab on chapters/ (end it with Ctrl-C)"
	@$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/chapters/00_start_here.ipynb $(AS_ROOT) $(LAB_ARGS)

reset: $(VENV)/.stamp-lab
	@[ -n "$(CHAPTER)" ] || { echo "Name a chapter, for example: make reset CHAPTER=01" >&2; exit 1; }
	@$(PY) -m dsv3.book --reset chapters/$(CHAPTER)_*.ipynb

train: $(VENV)/.stamp-train
	@echo "==> dsv3 train --preset mini --out $(OUT)$(if $(MINUTES), --max-minutes $(MINUTES))"
	@$(VENV)/bin/dsv3 train --preset mini --out "$(OUT)" $(if $(MINUTES),--max-minutes "$(MINUTES)")

# Debugger notes on stderr would differ from the stored outputs, hence PYDEVD_...
NBVAL := PYDEVD_DISABLE_FILE_VALIDATION=1 $(PY) -m pytest --nbval --nbval-current-env \
  --nbval-cell-timeout=120 --nbval-sanitize-with chapters/nbval_sanitize.cfg \
  -p dsv3.book.times -n $(JOBS) --dist loadscope chapters

check: $(VENV)/.stamp-check
	@echo "==> ruff: lint, then format (mend with: $(VENV)/bin/ruff check --fix; $(VENV)/bin/ruff format)"
	@$(VENV)/bin/ruff check --quiet
	@$(VENV)/bin/ruff format --check --quiet
	@echo "==> pyrefly: types"
	@$(VENV)/bin/pyrefly check --summary=none --python-interpreter-path $(PY)

PYTEST := $(PY) -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder

quick: check $(VENV)/.stamp-test
	@echo "==> tests, without those marked slow"
	@$(PYTEST) -m "not slow" -q --durations 5

test: $(VENV)/.stamp-test
	@echo "==> tests"
	@$(PYTEST) --durations 20
	@echo "==> notebooks, each run from top to bottom and compared with its stored outputs"
	@$(NBVAL)
	@echo "==> the same on one thread and without this machine's vector units: outputs hold anywhere"
	@OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default $(NBVAL)

clean:
	@echo "==> removing $(VENV), builds and caches"
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	@rm -rf build dist *.egg-info .pytest_cache
	@find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	  -type d -prune -exec rm -rf {} +

# A stamp is written when its step has succeeded. The first one holds the path of this folder: an
# environment does not survive the move of its folder, so a moved one is set up again.
ifneq ($(shell cat $(VENV)/.stamp-venv 2>/dev/null),$(CURDIR))
$(VENV)/.stamp-venv: FORCE
endif

$(VENV)/.stamp-venv:
	@command -v "$(PYTHON)" >/dev/null || { echo "No $(PYTHON) found. Install Python 3.11 or" \
	  "later, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), and 3.11 or later is needed." \
	  "Name a newer one, for example: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo \
	  "$(PYTHON) cannot make virtual environments." \
	  "On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@echo "==> making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv "$(VENV)"
	@printf '%s\n' "$(CURDIR)" > $@

# torch comes first and alone, so that TORCH_INDEX is asked for torch and for nothing else.
$(VENV)/.stamp-run: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "==> installing torch, by far the largest download: about 200 MB in its CPU build, several" \
	  "GB in the CUDA build that pip takes on Linux without TORCH_INDEX (see README)"
	@$(INSTALL) -qq setuptools
	@$(INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch
	@echo "==> installing dsv3 and what it needs (a minute at most)"
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

# matplotlib's list of fonts is made here: made in a notebook, it would leave a note among the
# outputs. JupyterLab is kept from asking each new reader whether to fetch news, and told to
# save chapters clean (dsv3/book/saved.py).
define PREPARE_BOOK
@$(PY) -c 'import matplotlib.font_manager'
@$(VENV)/bin/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" \
  >/dev/null 2>&1 || echo "==> JupyterLab may ask whether to fetch news; either answer will do"
@mkdir -p $(VENV)/etc/jupyter
@cp dsv3/book/jupyter_server_config.py $(VENV)/etc/jupyter/
endef

$(VENV)/.stamp-lab: $(VENV)/.stamp-run
	@echo "==> installing JupyterLab and what the notebooks import (a minute or two)"
	@$(INSTALL) --no-build-isolation --editable '.[book]'
	$(PREPARE_BOOK)
	@touch $@

$(VENV)/.stamp-train: $(VENV)/.stamp-run
	@echo "==> installing the plays that the model learns from (a few MB)"
	@$(INSTALL) --no-build-isolation --editable '.[train]'
	@touch $@

# After .stamp-run: what torch's functions take and give is read from torch itself.
$(VENV)/.stamp-check: $(VENV)/.stamp-run
	@echo "==> installing ruff and pyrefly (40 MB)"
	@$(INSTALL) --no-build-isolation --editable '.[check]'
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run
	@echo "==> installing what the tests and the notebooks need (about 360 MB, a few minutes)"
	@$(INSTALL) --no-build-isolation --editable '.[book,train,test]'
	$(PREPARE_BOOK)
	@touch $(VENV)/.stamp-lab $(VENV)/.stamp-train $@
