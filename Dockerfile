# The project in an image: what it installs is pinned, what it runs is the command line.
#
#   docker build --build-arg PLATFORM=tpu --tag REGISTRY/moepp:tpu .
#   docker run REGISTRY/moepp:tpu train --config=moepp_7b --workdir=gs://BUCKET/run
#
# requirements/image has every version and the SHA-256 of its files; pip refuses any other. They are
# those of Linux on x86-64. CONTRIBUTING.md says how to audit them, also without a network.
#
# PLATFORM: cpu, tpu or cuda. RUN_AS: the user's number; 0, root, only where a host's devices ask
# for it.
FROM python:3.11-slim-bookworm

WORKDIR /opt/moepp
COPY requirements/image requirements/image
ARG PLATFORM=cpu
RUN case "$PLATFORM" in \
      cpu) set -- ;; \
      tpu | cuda) set -- -r "requirements/image/$PLATFORM.txt" ;; \
      *) echo "error: PLATFORM=$PLATFORM must be cpu, tpu or cuda" >&2; exit 1 ;; \
    esac; \
    pip install --no-cache-dir --require-hashes -r requirements/image/build.txt && \
    pip install --no-cache-dir --require-hashes --no-build-isolation \
      -r requirements/image/cpu.txt "$@"

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
