# mochi-lora for an NVIDIA GPU. docs/rented-gpu.md says how it is built and run.
#
# NEVER BUILT OR RUN so far: no Docker daemon ran where it was written. It is linted by hadolint, and tests/test_dockerfile.py
# checks what can be checked without a build.
#
# `base` and not `runtime`: torch's wheels bring their CUDA libraries themselves (torch 2.13.0 asks for cuda-toolkit 13.0.3) and
# need of the host only its driver, 580 or newer. NVIDIA deletes the tags of driver branches that have ended; if this one
# cannot be pulled any more, take a later 13.x.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04

# Triton and Inductor (engine.compile) build what they launch when they run: hence compiler and Python.h. Versions are not
# pinned because Ubuntu's archive keeps only the newest. Video, sound and OpenGL libraries are not needed: wheels carry theirs.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# As in the Makefile: torch alone first, because it is by far the largest layer; then the rest without build isolation.
WORKDIR /app
COPY constraints.txt ./
RUN python3 -m venv /venv \
    && /venv/bin/python -m pip install --no-cache-dir -c constraints.txt setuptools torch==2.13.0
ENV PATH=/venv/bin:$PATH
COPY pyproject.toml README.md LICENSE NOTICE train.py ./
COPY configs ./configs
COPY data_prep ./data_prep
COPY mochi_lora ./mochi_lora
# For H100, H200 or B200: --build-arg EXTRAS=demo,flash4
ARG EXTRAS=demo
RUN python -m pip install --no-cache-dir -c constraints.txt --no-build-isolation ".[${EXTRAS}]"

# What was copied stays where docs/rented-gpu.md says: recipes in /app/configs, scripts in /app. /data starts without them.
#
# Models apart from work: they are the same for everybody, and large. /data is where a configuration's relative paths (clips,
# cache, runs) begin. No volumes below it: they would hide the folders of a /data that is mounted.
ENV HF_HOME=/models
RUN install --directory --owner=1000 --group=1000 /models /data
VOLUME ["/models", "/data"]
WORKDIR /data

# The user `ubuntu`, whom Ubuntu's image brings.
USER 1000:1000

# The page answers from when the models are loaded, which may take a download first. `--no-healthcheck` for other commands.
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=10s --start-period=60m --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 7860, timeout=5); c.request('GET', '/'); raise SystemExit(c.getresponse().status != 200)"]

# The image holds no password: DEMO_PASSWORD names the variable that `docker run -e DEMO_PASSWORD` hands in, and without it the
# demo refuses to start.
CMD ["mochi-lora", "demo", "--config", "mine.yaml", "--host", "0.0.0.0", "--password", "DEMO_PASSWORD"]
