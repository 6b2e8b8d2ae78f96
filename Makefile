# `make lab` to learn, `make test` to check, `make help` for the rest.
#
# Packages go into .venv at the versions of constraints.txt, the model into .cache; both are made once.
# Which Python .venv is made from can be chosen, and JupyterLab's options are passed on:
#     make lab PYTHON=/opt/python3.12/bin/python3 LAB_ARGS=--no-browser
# PyTorch for Linux brings several GB of CUDA libraries. Without a GPU, its own CPU build is enough:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make lab

PYTHON ?= python3 python python3.13 python3.12 python3.11
LAB_ARGS ?=

# With .venv/bin on the PATH, notebooks and launchers find `deepspeed` and `ninja`, as after `activate`. Threads that
# wait soon sleep: by default they keep their processor busy, and every other program on it waits for them. To sleep
# sooner still makes a kernel that has two processors to itself slower.
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH" GOMP_SPINCOUNT="$${GOMP_SPINCOUNT:-2000}" .venv/bin/python
FETCH_MODEL := @test -d "$${REFKL_CACHE:-.cache}/smollm2" || $(RUN) -m refkl_lib.models fetch smollm2
# Jupyter refuses to run as root unless told; in a container there is often nobody else.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help lab test bench notebooks site translate pdf room fresh lock

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-11s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

lab: .venv/.lab ## set up what is missing and open JupyterLab on the first notebook
	$(FETCH_MODEL)
	$(RUN) -m jupyterlab $(AS_ROOT) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(LAB_ARGS)

test: .venv/.test ## set up what is missing and check everything: style, types, library, notebooks
	$(FETCH_MODEL)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: .venv/.test ## measure speed and memory on this machine, into benchmarks/RESULTS.md
	$(FETCH_MODEL)
	$(RUN) -m tools.bench benchmarks/RESULTS.md benchmarks/*.py "benchmarks/price.py --truth" \
	    "benchmarks/frontier.py --group 8" \
	    "benchmarks/ledger_overhead.py --lora 8 --batch 1 --tokens 64" \
	    "benchmarks/kl_memory.py --tokens 512 2048 --vocabulary 49152 151936" \
	    "benchmarks/kl_memory.py --tokens 8192 --vocabulary 49152 151936 --rounds 1"

notebooks: .venv/.test ## run the notebooks and store their outputs
	$(FETCH_MODEL)
	$(RUN) -m tools.notebooks notebooks/*.ipynb

site: .venv/.test ## build the course as a site that needs no server, in build/site
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -c docs . build/site
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -c docs -D language=zh_CN . build/site/zh
	@echo "Open build/site/index.html, or build/site/zh/index.html for the Chinese edition"

translate: .venv/.test ## bring the Chinese catalogues, docs/locale, up to what the pages say
	@rm -rf build/gettext
	$(RUN) -m sphinx --builder gettext --quiet -c docs . build/gettext \
	    $$(cd docs/locale/zh_CN/LC_MESSAGES && find . -name '*.po' | sed 's/po$$/*/')
	$(RUN) -m sphinx_intl update --pot-dir build/gettext --locale-dir docs/locale --language zh_CN --no-obsolete
	$(RUN) -m sphinx_intl stat --locale-dir docs/locale --language zh_CN

pdf: site ## print each lesson of the site and the cheat sheet, in build/pdf
	$(RUN) -m tools.pdf build/site/notebooks/*.html build/site/docs/instructor/cheat_sheet.html --to build/pdf

room: .venv/.lab ## gather packages and model for a room without network, in build/room
	$(FETCH_MODEL)
	.venv/bin/python -m pip wheel --quiet --constraint constraints.txt --wheel-dir build/room/wheels \
	    '.[lab]' 'pip>=25.2' 'setuptools>=77'
	@rm -rf build/lib build/bdist.*  # what setuptools left would be in the next wheel, also files that are gone
	@mkdir -p build/room/cache && cp -R "$${REFKL_CACHE:-.cache}/smollm2" build/room/cache

fresh: .venv/.test ## try `make lab` in an empty folder with an empty HOME (downloads everything again)
	$(RUN) -m pytest -m fresh tests/test_lab.py tests/test_room.py

lock: .venv/bin/pip ## choose the versions in constraints.txt again, after pyproject.toml changed
	.venv/bin/python -m pip install --quiet uv
	.venv/bin/python -m uv pip compile pyproject.toml --output-file constraints.txt $(LOCK_ARGS) \
	    --all-extras --universal --python-version 3.11 --no-annotate --custom-compile-command 'make lock'

# The extra is the stamp's name; `test` contains `lab`. pip 25.2 resumes a download that broke off. The last two
# commands keep JupyterLab from greeting a learner with a question about its newsletter, and let it save notebooks that
# show no errors when they are opened again.
.venv/.lab .venv/.test: pyproject.toml constraints.txt Makefile | .venv/bin/pip
	@{ .venv/bin/python -m pip install --quiet --upgrade 'pip>=25.2' \
	    && .venv/bin/python -m pip install --constraint constraints.txt --editable '.[$(@:.venv/.%=%)]'; } \
	    || { echo "Not installed: the lines above say why. It takes a network (or PIP_INDEX_URL, a mirror)" \
	    "and 2 GB of disk, several more with CUDA; the same command goes on where this stopped." >&2; exit 1; }
	@$(RUN) -m jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements \
	    >.venv/labextension.log 2>&1
	@$(RUN) -m refkl_lib.view.saved
	@touch .venv/.lab $@

.venv/bin/pip:
	@for python in $(PYTHON); do \
	    "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	        2>/dev/null && exec "$$python" -m venv .venv; \
	done; \
	echo "Python 3.11 to 3.14 with venv is needed and none of these is: $(PYTHON). Install one" \
	    "(Debian, Ubuntu: apt install python3-venv), name it with PYTHON=…, or use conda: environment.yml." >&2; \
	exit 1
