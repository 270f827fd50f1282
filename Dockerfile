# syntax=docker/dockerfile:1
# docker build -t image-classifier-service .                                     ResNet-50, baked into the image
# docker build -t … --build-arg MODEL_NAME=efficientnet_lite0 .                  another model
# docker build -t … --build-arg PIP_EXTRA_INDEX_URL=<index of CPU builds> .      torch without CUDA: gigabytes smaller
# docker build -t … --target slim .                                              without torch: the baked model only
# docker build -t … --build-arg WITH_JOBS=1 .                                    with what JOBS, HISTORY and INPUT_URLS need
# docker build -t … --build-arg WITH_TRACING=1 .                                 with what tracing (OTEL_*) needs
ARG BASE_IMAGE=python:3.11-slim

# --- packages and the exported model, the only parts of this stage that are shipped ---
FROM ${BASE_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=
ARG MODEL_NAME=resnet50
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
WORKDIR /app
RUN python3 -m venv /opt/venv
ARG WITH_JOBS=
ARG WITH_TRACING=
COPY requirements.txt .
COPY app/jobs/requirements.txt jobs/
COPY app/tracing/requirements.txt tracing/
RUN pip install -r requirements.txt ${WITH_JOBS:+-r jobs/requirements.txt} ${WITH_TRACING:+-r tracing/requirements.txt}
COPY app app
RUN MODEL_NAME=${MODEL_NAME} DEVICE=cpu python -m app prepare && cp -a models slim-models \
    && MODEL_NAME=${MODEL_NAME} DEVICE=cpu ENGINE=torch python -m app prepare && rm -rf models/weights slim-models/weights
# The same packages, without those that only the export needs; jobs need fsspec, too.
RUN cp -a /opt/venv /opt/slim && /opt/slim/bin/python -m pip freeze | sed 's/[ =@].*//' \
    | grep -E '^(torch|torchvision|triton|sympy|networkx|mpmath|fsspec|nvidia-.*|cuda-.*)$' \
    | grep -vx "${WITH_JOBS:+fsspec}" \
    | xargs /opt/slim/bin/python -m pip uninstall --yes --quiet

# --- common to all images ---
FROM ${BASE_IMAGE} AS base
ARG MODEL_NAME=resnet50
ARG WITH_JOBS=
ENV MODEL_NAME=${MODEL_NAME} PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --system --uid 10001 --home-dir /app --shell /usr/sbin/nologin service \
    && mkdir -p /app/models ${WITH_JOBS:+/app/data} && chown service /app /app/models ${WITH_JOBS:+/app/data}
WORKDIR /app
COPY gunicorn.conf.py .
COPY app app
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["python", "-m", "app", "health"]
# Stopping takes DRAIN_SECONDS plus the requests in flight: docker run --stop-timeout 40 (or docker stop --time 40).
STOPSIGNAL SIGTERM
CMD ["gunicorn", "app:create_app()"]

# --- the small image: serves the baked model on the CPU ---
FROM base AS slim
COPY --from=build --chown=10001 /app/slim-models models
COPY --from=build /opt/slim /opt/venv
USER 10001

# --- the default image: every model, MODEL_PATH, GPUs ---
FROM base AS full
COPY --from=build --chown=10001 /app/models models
COPY --from=build /opt/venv /opt/venv
USER 10001
