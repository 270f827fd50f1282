# Needs Python 3.11 or newer and pip's registry; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MODEL_FALLBACK ?= efficientnet_lite0

help:  ## Say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/tests-installed: $(VENV)/installed tests/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

run: $(VENV)/installed  ## Serve on port 5000: ResNet-50, or EfficientNet-Lite0 where its weights cannot be had
	@LOG_FORMAT=$${LOG_FORMAT:-text} exec $(BIN)/gunicorn 'app:create_app()'

test: $(VENV)/tests-installed  ## Run the tests
	@env -u MODEL_FALLBACK $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/tests-installed  ## Check the style
	@$(BIN)/ruff check .

RIVALS := litserve flask fastapi

$(VENV)-rival-%/installed: bench/rivals/requirements-%.txt $(VENV)/tests-installed  # sees the service's packages, torch among them
	$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/service.pth
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

bench: $(RIVALS:%=$(VENV)-rival-%/installed)  ## Measure against the limit and the rivals, 20 minutes, nothing else running
	@$(BIN)/python -m bench $(ARGS)

bench-quick: $(RIVALS:%=$(VENV)-rival-%/installed)  ## The same in 4 minutes
	@$(BIN)/python -m bench --quick $(ARGS)

exam: $(VENV)/tests-installed  ## The reliability exam, 13 minutes, nothing else running; ARGS="--quick --only 2,3"
	@env -u MODEL_FALLBACK $(BIN)/python -m pytest -p tests.exam.plugin tests/exam $(ARGS)

docker-build:  ## Build the container image
	docker build --tag image-classifier-service .

.PHONY: help run test lint bench bench-quick exam docker-build
.PRECIOUS: $(VENV)-rival-%/installed
