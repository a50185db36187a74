# A virtual environment of its own, so that an externally managed Python is left alone.
PYTHON ?= python3
VENV ?= .venv
# Linux: memory in large pages, or a fifth of a training step on a CPU goes into mapping small ones.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/lcm reproduce quickstart

test: $(VENV)/.tested
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
