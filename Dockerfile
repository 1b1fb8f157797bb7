# syntax=docker/dockerfile:1
# CPU:  docker build --target cpu -t embedcache:cpu .     docker run --rm -v "$PWD:/data" embedcache:cpu quickstart
# GPU:  docker build --target gpu -t embedcache:gpu .     docker run --rm --gpus all -v "$PWD:/data" embedcache:gpu --help
# The GPU image needs only the driver of the host (580 or later): torch and FAISS bring their CUDA libraries.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY embedcache embedcache
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
RUN useradd --create-home --uid 1000 embedcache && install -d -o embedcache -g embedcache /data
WORKDIR /data
ENV HF_HOME=/data/.cache/huggingface \
    PYTHONUNBUFFERED=1
ENTRYPOINT ["embedcache"]
CMD ["--help"]

FROM base AS cpu
ARG EXTRAS=cpu,demo,remote,serve,sweep
# hadolint ignore=DL3013 # the newest releases that the ranges of pyproject.toml allow
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu \
    && python -m pip install --no-cache-dir "$(echo /wheels/*.whl)[${EXTRAS}]"
USER 1000

FROM base AS gpu
ARG EXTRAS=gpu,demo,remote,serve,sweep
# hadolint ignore=DL3013 # as above
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir "$(echo /wheels/*.whl)[${EXTRAS}]"
USER 1000
