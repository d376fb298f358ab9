#!/usr/bin/env bash
# MoE++ 7B through xpk (pip install xpk), which makes the GKE cluster and writes the JobSet.
# docs/PODS.md has the whole way. xpk has no flag for the user of a container: build the image
# with `--build-arg RUN_AS=0`, as the host's TPU device files may not be open to another.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/xpk.sh cluster | storage | run [FLAG...] | list | stop | delete

  cluster  make a GKE cluster with the TPU slices
  storage  let every job see the bucket, read-only, at /data
  run      start training; FLAGs are added to the command
  list     the jobs of the cluster
  stop     end the job; the same `run` goes on from its newest checkpoint
  delete   give the cluster back

needs: PROJECT, ZONE; storage and run also BUCKET (no gs://), run also IMAGE (REGISTRY/NAME:TAG)
may have: CLUSTER (moepp), NAME (moepp-7b), TPU_TYPE (v5p-128, in TensorCores: 64 chips),
  SLICES (1), CAPACITY (--on-demand; or --spot, --reservation=NAME)
TEXT
}

need() {
  local name
  for name in "$@"; do
    if [[ -z "${!name:-}" ]]; then
      echo "error: $name is not set: write $name=... before the command" >&2
      usage >&2
      exit 2
    fi
  done
}

run() {
  need BUCKET IMAGE
  local command=(
    python -m moepp_jax.main train --config=moepp_7b
    "--workdir=gs://$BUCKET/runs/moepp_7b" --distributed=on
    --config.data.sources.text.path=/data/corpus --config.data.dir=/data/prepared
    "--config.mesh.data=$SLICES" --config.mesh.fsdp=4 --config.mesh.expert=16 "$@"
  )
  # A run that was told to stop, or lost a host, ends with an error: it is to be started again.
  xpk workload create "${PLACE[@]}" --workload="$NAME" --tpu-type="$TPU_TYPE" \
    --num-slices="$SLICES" --docker-image="$IMAGE" --max-restarts=50 \
    --restart-on-user-code-failure --termination-grace-period-seconds=120 \
    --command="$(printf '%q ' "${command[@]}")"
}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  usage
  exit
fi
need PROJECT ZONE
CLUSTER=${CLUSTER:-moepp}
PLACE=(--project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER")
NAME=${NAME:-moepp-7b}
TPU_TYPE=${TPU_TYPE:-v5p-128}
SLICES=${SLICES:-1}
CAPACITY=${CAPACITY:---on-demand}

case "${1:-}" in
  cluster)
    xpk cluster create "${PLACE[@]}" --tpu-type="$TPU_TYPE" --num-slices="$SLICES" "$CAPACITY"
    ;;
  storage)
    need BUCKET
    xpk storage attach moepp-data "${PLACE[@]}" --type=gcsfuse --bucket="$BUCKET" \
      --mount-point=/data --readonly=true --auto-mount=true --size=1
    ;;
  run) run "${@:2}" ;;
  list) xpk workload list "${PLACE[@]}" ;;
  stop) xpk workload delete "${PLACE[@]}" --workload="$NAME" ;;
  delete) xpk cluster delete "${PLACE[@]}" ;;
  *)
    echo "error: give one of cluster, storage, run, list, stop, delete, not '${1:-}'" >&2
    usage >&2
    exit 2
    ;;
esac
