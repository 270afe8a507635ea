# Each target makes what it needs in .venv, from nothing but Python 3.10 or later with venv.
PYTHON ?= python3
PYTHON_OLDEST ?= $(PYTHON)
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2
ZENNIT_FACING := $(addprefix tests/,relevance looking/test_heatmap.py promises/test_closed_forms.py repairs/test_targets.py)

.PHONY: demo test test-other-zennit test-slow test-cuda test-oldest lint docs benchmark notebooks clean

demo: $(VENV)/demo.installed
	$(VENV)/bin/zennit-prune demo

test: $(VENV)/test.installed
	$(RUN) -m pytest -n $(WORKERS)
	$(MAKE) test-other-zennit

# Zennit 0.5.1 and 1.0.0 differ in their hooks: what touches them is tested with the one that is not installed, too.
test-other-zennit: $(VENV)/test.installed
	other=$$($(RUN) -c "from importlib.metadata import version; print('1.0.0' if version('zennit') < '1' else '0.5.1')") && \
	$(RUN) -m pip install --quiet --no-deps --ignore-requires-python --upgrade --target $(VENV)/zennit-$$other zennit==$$other && \
	PYTHONPATH=$(VENV)/zennit-$$other $(RUN) -m pytest -n $(WORKERS) $(ZENNIT_FACING)

test-slow: $(VENV)/test.installed
	$(RUN) -m pytest -n $(WORKERS) -m slow

# What runs on every device, where one of them is a GPU: in one process, for they share it.
test-cuda: $(VENV)/test.installed
	@$(RUN) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make test-cuda needs a GPU that this PyTorch (' \
	    + torch.__version__ + ') can use, and there is none: torch.cuda.is_available() is False.')"
	$(RUN) -m pytest -m device

# The oldest PyTorch that pyproject.toml allows, with the torchvision that fits: it needs Python 3.10 to 3.12.
test-oldest: pyproject.toml
	test -x $(VENV)-oldest/bin/python || $(PYTHON_OLDEST) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --editable '.[test]' torch==2.4.0 torchvision==0.19.0
	$(VENV)-oldest/bin/python -m pytest -n $(WORKERS)

lint: $(VENV)/lint.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) docs/docstrings.py

# The API reference and the other pages of docs/; it needs no network, but with one it links more of what others document.
docs: $(VENV)/docs.installed
	$(RUN) -m sphinx --fail-on-warning --keep-going -b html docs build/docs

benchmark: $(VENV)/benchmark.installed
	$(RUN) benchmarks/structure.py
	$(RUN) benchmarks/coverage.py
	$(RUN) benchmarks/selection.py
	$(RUN) benchmarks/starts.py

# All of notebooks/, in place; those on pretrained networks where ZENNIT_PRUNE_DATA names a folder that has them.
notebooks: $(VENV)/notebooks.installed
	$(RUN) notebooks/execute.py

$(VENV)/%.installed: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest demo build
