# Needs Python 3.11 or newer and a Python package index; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What holds where neither the environment nor .env sets these, be it to nothing.
DEFAULTS := LOG_FORMAT=text MODEL_FALLBACK=efficientnet_lite0

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# A PYTHON that is named must be the version that .venv has, once that is there.
RELEASE := 'import sys; print("%d.%d" % sys.version_info[:2])'
python-fits:
ifeq ($(origin PYTHON),command line)
	@if [ -x $(BIN)/python ] && [ "$$($(PYTHON) -c $(RELEASE))" != "$$($(BIN)/python -c $(RELEASE))" ]; then \
		echo "$(VENV) has Python $$($(BIN)/python -c $(RELEASE)): to use $(PYTHON), remove it first (rm -r $(VENV))" >&2; exit 1; fi
endif

$(VENV)/installed: requirements.txt | python-fits
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the packages into $(VENV): about two minutes and 1.5 GB, once"
	@$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/jobs-installed: $(VENV)/installed app/jobs/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r app/jobs/requirements.txt
	@touch $@

$(VENV)/tracing-installed: $(VENV)/installed app/tracing/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r app/tracing/requirements.txt
	@touch $@

$(VENV)/int8-installed: $(VENV)/installed app/prepare/requirements-int8.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r app/prepare/requirements-int8.txt
	@touch $@

# Those packages, if the environment or .env turns one of these parts on.
ON := on On ON true True TRUE yes Yes YES 1
OPTIONAL := $(if $(filter $(ON),$(JOBS) $(HISTORY))$(strip $(INPUT_URLS))$(shell grep -siE \
	'^ *(export +)?((JOBS|HISTORY) *= *.?(on|true|yes|1)|INPUT_URLS *= *.?[a-z])' .env),$(VENV)/jobs-installed)
TRACING := $(if $(filter-out none,$(OTEL_TRACES_EXPORTER))$(strip $(OTEL_EXPORTER_OTLP_ENDPOINT) \
	$(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT))$(shell grep -sE '^ *(export +)?(OTEL_TRACES_EXPORTER *= *.?(otlp|console)|OTEL_EXPORTER_OTLP_(TRACES_)?ENDPOINT *= *.?[a-z])' \
	.env),$(VENV)/tracing-installed)

INT8 := $(if $(strip $(filter int8 INT8 auto AUTO,$(foreach name,$(filter PRECISION %__PRECISION,$(.VARIABLES)),$($(name)))) \
	$(shell grep -siE '^ *(export +)?([A-Z0-9_]+__)?PRECISION *= *.?(int8|auto)' .env)),$(VENV)/int8-installed)

$(VENV)/tests-installed: $(VENV)/installed tests/requirements.txt app/jobs/requirements.txt app/tracing/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

run: $(VENV)/installed $(OPTIONAL) $(TRACING) $(INT8)  ## Serve ResNet-50 on port 5000, or EfficientNet-Lite0 if its weights cannot be downloaded
	@SERVICE_DEFAULTS='$(DEFAULTS)' exec $(BIN)/gunicorn 'app:create_app()'

worker: $(VENV)/jobs-installed $(TRACING) $(INT8)  ## Run the jobs that a service with JOBS=on accepts
	@SERVICE_DEFAULTS='$(DEFAULTS)' exec $(BIN)/python -m app worker

jobs-demo: $(VENV)/jobs-installed  ## Show jobs, a callback (webhook) and the history at work; ARGS=--embedded without Redis and PostgreSQL
	@PYTHONPATH=. exec $(BIN)/python deploy/jobs_demo.py $(ARGS)

smoke:  ## Check a running service, as after a deployment: URL=https://example.org/ KEY=… (port 5000 of this machine by default)
	@$(PYTHON) -m app smoke '$(or $(URL),http://127.0.0.1:$(or $(PORT),5000))' $(if $(KEY),--key '$(KEY)')

$(VENV)-v2-clients/installed: tests/open_inference/requirements.txt $(VENV)/installed
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

PARTS := $(addprefix tests/,data history insight jobs open_inference outbound tracing)
PYTEST := env -u MODEL_FALLBACK -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

# In seconds of processor time: five minutes of two cores.
BUDGET := 600

# Files start in the order of tests/conftest.py. The tests start Python some hundred times: it may keep its bytecode.
test: $(VENV)/tests-installed  ## Run the tests of everything but the optional parts
	@$(BIN)/python tests/cost.py $(BUDGET) $(PYTEST) $(PARTS:%=--ignore=%) $(ARGS)

test-web: $(VENV)/tests-installed  ## Run the longer tests of the page and /docs in Chromium, and schemathesis
	@env -u MODEL_FALLBACK $(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests/api/test_openapi.py \
		tests/api/test_page_results.py tests/api/test_docs.py $(ARGS)

test-parts: $(VENV)/tests-installed $(VENV)-v2-clients/installed  ## Run the tests of the optional parts: jobs, history, tracing, insight, V2
	@$(PYTEST) $(PARTS) $(ARGS)

lint: $(VENV)/tests-installed  ## Run ruff and import-linter
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-cache --no-logo

lines: $(VENV)/tests-installed  ## Count the lines that a worker with the default settings imports: at most 3,000
	@$(BIN)/python tests/core_lines.py 3000

RIVALS := litserve flask fastapi bentoml

$(VENV)-rival-%/installed: bench/rivals/requirements-%.txt $(VENV)/tests-installed  # sees the service's packages, torch among them
	$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/service.pth
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)-audit/installed: tests/requirements-audit.txt $(VENV)/installed
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

AUDITED := $(RIVALS:%=$(VENV)-rival-%) $(VENV)-voice-cloning $(VENV)-v2-clients

audit: $(VENV)-audit/installed $(VENV)/tests-installed $(AUDITED:%=%/installed)  ## Look up all packages, those of the tests, the examples and the benchmark too, in PyPI's list of vulnerabilities
	@$(VENV)-audit/bin/python tests/audit.py $(BIN)/python $(AUDITED:%=%/bin/python) $(if $(ARGS),-- $(ARGS))

bench: $(RIVALS:%=$(VENV)-rival-%/installed) $(VENV)/int8-installed  ## Benchmark against the limit and the alternatives (35 minutes, on an idle machine)
	@$(BIN)/python -m bench $(ARGS)

bench-quick: $(RIVALS:%=$(VENV)-rival-%/installed) $(VENV)/int8-installed  ## Run a shorter benchmark (8 minutes)
	@$(BIN)/python -m bench --quick $(ARGS)

bench-jobs: $(VENV)/tests-installed  ## Benchmark jobs, history and tracing; ARGS="--only history" (25 minutes)
	@$(BIN)/python -m bench.jobs $(ARGS)

bench-scale: $(VENV)/tests-installed  ## Measure several instances behind HAProxy, if it is installed, and write bench/scale.md (5 minutes)
	@$(BIN)/python -m bench.scale $(ARGS)

exam: $(VENV)/tests-installed  ## Run the reliability exam (at most 15 minutes, on an idle machine); ARGS="--quick --only 2,3"
	@env -u MODEL_FALLBACK $(BIN)/python -m pytest -p tests.exam.plugin tests/exam $(ARGS)

$(VENV)-fuzz/installed: tests/fuzz/requirements.txt $(VENV)/tests-installed  # sees the tests' packages
	$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/service.pth
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)-voice-cloning/installed: examples/requirements-voice-cloning.txt $(VENV)/tests-installed  # sees the tests' packages
	$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/service.pth
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps voxcpm==2.0.3
	@# Where torch is a CPU build and torchaudio is not, torchaudio runs without its compiled part, once that is gone.
	@$(@D)/bin/python -c 'import torchaudio' 2>/dev/null || rm -f $(@D)/lib/python*/site-packages/torchaudio/lib/*.so
	@touch $@

test-examples: $(VENV)-voice-cloning/installed  ## Run the tests of examples/; VoxCPM has random weights there
	@env -u MODEL_FALLBACK $(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests/examples/test_iris.py tests/examples/test_speech.py $(ARGS)
	@env -u MODEL_FALLBACK $(VENV)-voice-cloning/bin/python -m pytest tests/examples/test_voice_cloning.py $(ARGS)

test-int8: $(VENV)/tests-installed  ## Run the longer tests of PRECISION=int8 and auto
	@env -u MODEL_FALLBACK $(BIN)/python -m pytest -n 2 --dist load -m slow tests/prepare/test_quantize.py $(ARGS)

test-deploy: $(VENV)/tests-installed  ## Run compose.yaml's and deploy/'s configurations, make jobs-demo and what images consist of with the real programs
	@env -u MODEL_FALLBACK $(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests/test_image.py tests/test_jobs_demo.py \
		tests/test_compose.py tests/test_balancers.py tests/test_monitoring.py $(ARGS)

SECONDS := 60

fuzz: $(VENV)-fuzz/installed  ## Fuzz what parses uploads, a minute per target; SECONDS=600 for longer
	@for target in pictures containers json uploads; do \
		$(VENV)-fuzz/bin/python tests/fuzz/fuzz.py $$target $(VENV)-fuzz/inputs -max_total_time=$(SECONDS) || exit 1; \
	done

CONTAINER := docker
TARGET := cpu
IMAGE := image-classifier-service
IMAGE_ARGS := MODEL_NAME MODEL_PATH LABELS_PATH PREPROCESSING PRECISION WEIGHTS_MIRROR TORCH_INDEX WITH_JOBS WITH_TRACING BASE_IMAGE
VERSION = $(shell sed -n 's/^NAME, VERSION = .*"\(.*\)"$$/\1/p' app/config.py)

version:  ## Print the version
	@echo $(VERSION)

image:  ## Build the image: TARGET=cpu, full or gpu; MODEL_NAME=…, TORCH_INDEX=…, see docs/operations.md
	$(CONTAINER) build --target $(TARGET) --tag $(IMAGE) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) \
		$(foreach name,$(IMAGE_ARGS),$(if $($(name)),--build-arg $(name)="$($(name))")) $(ARGS) .

image-run:  ## Run the image on port 5000 (PORT=…), read-only and without capabilities
	$(CONTAINER) run --rm --read-only --cap-drop ALL --security-opt no-new-privileges \
		--publish $(or $(PORT),5000):5000 $(ARGS) $(IMAGE)

$(VENV)-release/installed: deploy/requirements.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

lock: $(VENV)-release/installed  ## Lock the images' packages, from the pins in the requirements files; ARGS=--upgrade
	@$(VENV)-release/bin/python deploy/lock.py $(ARGS)

sbom: $(VENV)-release/installed  ## List the packages of the image in CycloneDX's format: TARGET=cpu, full or gpu
	@$(VENV)-release/bin/python deploy/sbom.py $(TARGET)

lint-images: $(VENV)-release/installed  ## Check the Dockerfile, the workflows, compose.yaml and deploy/kubernetes.yaml
	@$(VENV)-release/bin/hadolint Dockerfile
	@$(VENV)-release/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(VENV)-release/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	@$(VENV)-release/bin/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	@$(VENV)-release/bin/kubernetes-validate --strict --quiet deploy/kubernetes.yaml

.PHONY: help python-fits run worker jobs-demo smoke test lint lines audit bench bench-quick bench-jobs bench-scale exam test-parts test-web test-examples test-int8 test-deploy fuzz version image image-run lock sbom lint-images
.PRECIOUS: $(VENV)-rival-%/installed
