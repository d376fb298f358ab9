# The project in an image: what it installs is pinned, what it runs is the command line.
#
#   docker build --build-arg PLATFORM=tpu --tag REGISTRY/moepp:tpu .
#   docker run REGISTRY/moepp:tpu train --config=moepp_7b --workdir=gs://BUCKET/run
#
# Versions are pinned, hashes are not: each platform has other wheels, and an index never replaces a
# file. CONTRIBUTING.md says how to install by hash from a mirror, and how to audit what is pinned.
#
# PLATFORM: cpu, tpu or cuda. RUN_AS: the user's number; 0, root, only where a host's devices ask
# for it.
FROM python:3.11-slim-bookworm

WORKDIR /opt/moepp
COPY requirements.txt ./
COPY requirements requirements
ARG PLATFORM=cpu
RUN case "$PLATFORM" in \
      cpu) set -- ;; \
      tpu | cuda) set -- -r "requirements/$PLATFORM.txt" ;; \
      *) echo "error: PLATFORM=$PLATFORM must be cpu, tpu or cuda" >&2; exit 1 ;; \
    esac; \
    pip install --no-cache-dir -r requirements.txt -r requirements/cloud.txt "$@"

COPY configs configs
COPY moepp_jax moepp_jax
COPY benchmarks benchmarks
COPY experiments experiments
RUN python -m moepp_jax.main completion bash > /dev/null && useradd --uid 1000 --create-home moepp

# What nvidia's container runtime gives to an image that is not its own.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV PYTHONUNBUFFERED=1

ARG RUN_AS=1000
USER ${RUN_AS}
ENTRYPOINT ["python", "-m", "moepp_jax.main"]
CMD ["--help"]
