# make demo: set up and adapt LiteMedSAM to lesions.  make test: set up and run the tests.  All of it is make.py's work.
PYTHON ?= python3
VENV ?= .venv
TASKS := demo test test-label test-deploy set-up set-up-test set-up-label set-up-deploy

.PHONY: $(TASKS) always

$(TASKS):
	$(PYTHON) make.py $@ --venv $(VENV)

# What says that an environment is there; the script knows whether it has to be made again.
$(VENV)/.installed: always
	$(PYTHON) make.py set-up --venv $(VENV)

$(VENV)/.installed-test: always
	$(PYTHON) make.py set-up-test --venv $(VENV)

$(VENV)-label/.installed $(VENV)-deploy/.installed: $(VENV)-%/.installed: always
	$(PYTHON) make.py set-up-$* --venv $(VENV)
