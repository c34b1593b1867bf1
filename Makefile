# Every command first makes the environment in .venv, once. Needed beforehand: make, and Python 3.11 or newer.
#   PYTHON=...    the Python to make the environment with
#   PIP_ARGS=...  further arguments for pip. On Linux pip's standard PyTorch holds gigabytes of CUDA libraries; without a
#                 GPU, PIP_ARGS='--extra-index-url ADDRESS' with the address that PyTorch's "Get Started" page shows for
#                 Linux, Pip, CPU gets the small build. pip's own configuration (pip.conf, PIP_*) holds as always.
#   PROMPT=...    the text that `make demo` animates
#   LAB_ARGS=...  further arguments for JupyterLab, for example --no-browser
PY := .venv/bin/python
MADE := .venv/.made

# A prompt counts only where it is given to make: some shells keep their own PROMPT in the environment.
# It reaches the program through the environment, so that no shell and no make reads its quotes and dollars.
ifeq ($(origin PROMPT),command line)
override PROMPT := $(value PROMPT)
else
override PROMPT :=
endif
export PROMPT PYTHON PIP_ARGS

# An environment whose Python has gone, or that was moved here with its folder, is made again.
$(shell test -x $(PY) -a "$$(cat $(MADE) 2>/dev/null)" = "$(CURDIR)" || rm -f $(MADE))

.PHONY: help demo test check doctor lab clean
help:
	@echo "make demo                 text to animations with the shipped nano model, into demo/"
	@echo "make demo PROMPT=\"...\"    the same for your own text"
	@echo "make test                 every notebook and every test"
	@echo "make check                that, ruff, mypy and the coverage of the package: what CI runs"
	@echo "make doctor               is this machine fit for the book? [OK] or [FAIL] for each thing looked at"
	@echo "make lab                  the book, in JupyterLab"
	@echo "make clean                removes the environment and what was built"

$(MADE): settings.ini setup.py constraints.txt
	@sh .ci/environment
	@echo "$(CURDIR)" > $@

demo: $(MADE)
	@$(PY) -m animatediff_lit.pipeline --out demo $${PROMPT:+"--prompt=$$PROMPT"}

test: $(MADE)
	@$(PY) -m pytest

check: $(MADE)
	@$(PY) -m ruff check
	@$(PY) -m mypy
	@$(PY) -m pytest --cov

doctor: $(MADE)
	@$(PY) -m animatediff_lit.doctor

lab: $(MADE)
	@$(PY) -m jupyterlab $(LAB_ARGS) nbs/00_tour.ipynb

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
