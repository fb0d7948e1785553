# `make demo` and `make test` need only Python and pip; each makes the virtual environment it uses.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
OUT ?= runs/demo

.PHONY: demo test slow lint clean

demo: $(VENV)/demo.stamp
	$(RUN) examples/demo.py --out $(OUT)

test: $(VENV)/test.stamp
	$(RUN) -m pytest

slow: $(VENV)/test.stamp
	$(RUN) -m pytest -n 0 -m slow

lint: $(VENV)/dev.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/%.stamp: pyproject.toml constraints.txt
	$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs/demo
