# syntax=docker/dockerfile:1
# docker build -t image-classifier-service .                                     cpu: serves the model in it, without torch
# docker build -t … --target full .                                              torch for CPUs: any MODEL_PATH at run time
# docker build -t … --target gpu .                                               torch for NVIDIA GPUs
# docker build -t … --build-arg MODEL_NAME=efficientnet_lite0 .                  another model
# docker build -t … --build-arg TORCH_INDEX=URL .                                where PyTorch's CPU builds are, see below
# docker build -t … --build-context checkpoint=FOLDER --build-arg MODEL_PATH=/checkpoint/my.pt .    a model of your own
# docker build -t … --build-arg WITH_JOBS=1 .                                    with what JOBS, HISTORY and INPUT_URLS need
# docker build -t … --build-arg WITH_TRACING=1 .                                 with what tracing (OTEL_*) needs
# docs/operations.md has all of them. `make image` is the first one, with the labels.
ARG BASE_IMAGE=python:3.11-slim

# --- what all images have in common ---
FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# Only the models and what jobs work on belong to the service, and to group 0, which has any user chosen at run time.
RUN groupadd --gid 10001 service \
    && useradd --uid 10001 --gid 10001 --home-dir /app --no-create-home --shell /usr/sbin/nologin service \
    && mkdir -p /app/models /app/data && chown 10001:0 /app/models /app/data && chmod 775 /app/models /app/data
WORKDIR /app
EXPOSE 5000
# Builders that write OCI images, such as Podman's, drop it: then the probes of compose.yaml and deploy/ take its place.
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 CMD ["python", "-m", "app", "health"]
STOPSIGNAL SIGTERM
CMD ["gunicorn", "app:create_app()"]

# --- packages, by their hashes ---
FROM ${BASE_IMAGE} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_PYTHON=/opt/venv/bin/python
RUN python3 -m venv --without-pip /opt/venv
ARG WITH_JOBS=
ARG WITH_TRACING=
COPY deploy/locks/cpu.txt deploy/locks/jobs.txt deploy/locks/tracing.txt /locks/
RUN pip install --require-hashes -r /locks/cpu.txt \
        ${WITH_JOBS:+-r /locks/jobs.txt} ${WITH_TRACING:+-r /locks/tracing.txt}

FROM packages AS packages-cpu
COPY deploy/slim.py /
RUN python3 /slim.py /opt/venv cpu

# TORCH_INDEX: PyTorch's index of CPU builds, see its installation page. On Linux, pip's own index has CUDA's torch:
# without TORCH_INDEX, gigabytes more are downloaded to convert the model, and `full` cannot be built.
FROM packages AS packages-torch
ARG TORCH_INDEX=
COPY deploy/locks/torch.txt /locks/
COPY requirements.txt /
RUN pip install --require-hashes -r /locks/torch.txt \
    && grep -E '^torch(vision)?==' /requirements.txt >/torch.txt \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r /torch.txt

FROM packages-torch AS packages-full
COPY deploy/slim.py /
RUN /opt/venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda and "this torch is built for CUDA: pass \
--build-arg TORCH_INDEX=URL, the index of CPU builds that PyTorch names on its installation page")' \
    && python3 /slim.py /opt/venv full

FROM packages AS packages-gpu
COPY deploy/locks/gpu.txt /locks/
COPY deploy/slim.py /
RUN pip install --require-hashes -r /locks/gpu.txt && python3 /slim.py /opt/venv full

# --- the model, converted; depends on what converts it and on nothing else of the application ---
FROM scratch AS checkpoint
FROM scratch AS converter
COPY app/*.py /app/
COPY app/server /app/server
COPY app/tasks/__init__.py app/tasks/options.py /app/tasks/
COPY app/engine /app/engine
COPY app/media /app/media
COPY app/prepare /app/prepare

FROM packages-torch AS export
ARG PRECISION=
COPY deploy/locks/int8.txt /locks/
RUN case "$PRECISION" in int8|auto) pip install --require-hashes -r /locks/int8.txt ;; esac
WORKDIR /app
COPY --from=converter /app app
ARG MODEL_NAME=resnet50
ARG MODEL_PATH=
ARG LABELS_PATH=
ARG PREPROCESSING=
ARG WEIGHTS_MIRROR=
COPY deploy/convert.sh /
RUN --mount=type=bind,from=checkpoint,target=/checkpoint sh /convert.sh openvino

FROM packages-gpu AS export-gpu
WORKDIR /app
COPY --from=converter /app app
ARG MODEL_NAME=resnet50
ARG MODEL_PATH=
ARG LABELS_PATH=
ARG PREPROCESSING=
ARG WEIGHTS_MIRROR=
COPY deploy/convert.sh /
RUN --mount=type=bind,from=checkpoint,target=/checkpoint sh /convert.sh torch openvino

# Compiled, as a user who may not write to /app would compile it again with each start.
FROM ${BASE_IMAGE} AS application
COPY app /app/app
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /app/app

# --- the images: packages, models, configuration and application, from what changes least to what changes most ---
FROM base AS gpu
COPY --from=packages-gpu /opt/venv /opt/venv
COPY --from=export-gpu --chown=10001:0 /app/models models
COPY --from=export-gpu /kept /checkpoint
COPY gunicorn.conf.py .
COPY --from=application /app/app app
USER 10001:10001
ARG MODEL_NAME=resnet50
ARG MODEL_PATH=
ARG LABELS_PATH=
ARG PREPROCESSING=
ENV SERVICE_DEFAULTS="MODEL_NAME=$MODEL_NAME MODEL_PATH=$MODEL_PATH LABELS_PATH=$LABELS_PATH \
PREPROCESSING=$PREPROCESSING"
ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="image-classifier-service" org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION org.opencontainers.image.created=$CREATED \
      org.opencontainers.image.description="ImageNet classes or apparent Big Five traits over HTTP, on NVIDIA GPUs"

FROM base AS full
COPY --from=packages-full /opt/venv /opt/venv
COPY --from=export --chown=10001:0 /app/models models
COPY --from=export /kept /checkpoint
COPY gunicorn.conf.py .
COPY --from=application /app/app app
USER 10001:10001
ARG MODEL_NAME=resnet50
ARG MODEL_PATH=
ARG LABELS_PATH=
ARG PREPROCESSING=
ARG PRECISION=
ENV SERVICE_DEFAULTS="MODEL_NAME=$MODEL_NAME MODEL_PATH=$MODEL_PATH LABELS_PATH=$LABELS_PATH \
PREPROCESSING=$PREPROCESSING PRECISION=$PRECISION"
ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="image-classifier-service" org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION org.opencontainers.image.created=$CREATED \
      org.opencontainers.image.description="ImageNet classes or apparent Big Five traits over HTTP, with torch for CPUs"

FROM base AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=export --chown=10001:0 /app/models models
COPY --from=export /kept /checkpoint
COPY gunicorn.conf.py .
COPY --from=application /app/app app
USER 10001:10001
ARG MODEL_NAME=resnet50
ARG MODEL_PATH=
ARG LABELS_PATH=
ARG PREPROCESSING=
ARG PRECISION=
ENV SERVICE_DEFAULTS="MODEL_NAME=$MODEL_NAME MODEL_PATH=$MODEL_PATH LABELS_PATH=$LABELS_PATH \
PREPROCESSING=$PREPROCESSING PRECISION=$PRECISION"
ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="image-classifier-service" org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION org.opencontainers.image.created=$CREATED \
      org.opencontainers.image.description="ImageNet classes or apparent Big Five traits over HTTP, on CPUs"
