#!/usr/bin/env bash
# MoE++ 7B on Cloud TPU VMs, every host given the same command. docs/PODS.md has the whole way.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh create | status | install | run [FLAG...] | logs | stop | delete

  create   ask for the TPU VMs; the request waits in the queue of the zone
  status   how the request stands; ACTIVE means that the VMs are there
  install  on every host: mount the bucket read-only at /mnt/moepp, pull the image
  run      start training on every host; FLAGs are added to the command
  logs     follow the first host's log
  stop     SIGTERM to all: the run is saved; `run` goes on from there
  delete   give the VMs back

needs: PROJECT, ZONE; install and run also BUCKET (no gs://) and IMAGE (REGISTRY/NAME:TAG)
may have: NAME (moepp-7b), TPU_TYPE (v5p-128, in TensorCores: 64 chips), SLICES (1),
  RUNTIME (v2-alpha-tpuv5), CAPACITY (a flag of queued-resources: --spot, --reserved, or none)
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

# On every host of every slice; HOSTS narrows that to one.
remote() {
  gcloud compute tpus queued-resources ssh "$NAME" "${PLACE[@]}" "${HOSTS[@]}" --command="$1"
}

create() {
  local nodes=(--node-id="$NAME")
  if ((SLICES > 1)); then
    nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" "${nodes[@]}" \
    --accelerator-type="$TPU_TYPE" --runtime-version="$RUNTIME" \
    --scopes=https://www.googleapis.com/auth/cloud-platform ${CAPACITY:+"$CAPACITY"}
}

install() {
  need BUCKET IMAGE
  local registry=${IMAGE%%/*}
  remote "$(
    cat <<REMOTE
set -euo pipefail
if ! command -v gcsfuse >/dev/null; then
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -q
  sudo apt-get install -y -q gcsfuse
fi
sudo mkdir -p /mnt/moepp
mountpoint -q /mnt/moepp || sudo gcsfuse -o ro -o allow_other --implicit-dirs ${BUCKET@Q} /mnt/moepp
sudo gcloud auth configure-docker ${registry@Q} --quiet
sudo docker pull --quiet ${IMAGE@Q}
REMOTE
  )"
}

run() {
  need BUCKET IMAGE
  # The host's network and devices are the TPU's. A host whose peer was lost ends with an error and
  # is started again; a stopped one is not.
  local command=(
    sudo docker run --detach --name=moepp --restart=on-failure:20 --stop-timeout=120
    --privileged --net=host --user=0 --volume=/mnt/moepp:/data:ro "$IMAGE"
    train --config=moepp_7b "--workdir=gs://$BUCKET/runs/moepp_7b" --distributed=on
    --config.data.sources.text.path=/data/corpus --config.data.dir=/data/prepared
    "--config.mesh.data=$SLICES" --config.mesh.fsdp=4 --config.mesh.expert=16 "$@"
  )
  # What is left of a run that has ended; of one that goes on, docker says that the name is taken.
  remote "sudo docker container prune --force >/dev/null;$(printf ' %q' "${command[@]}")"
}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  usage
  exit
fi
need PROJECT ZONE
PLACE=(--project="$PROJECT" --zone="$ZONE")
HOSTS=(--node=all --worker=all)
NAME=${NAME:-moepp-7b}
TPU_TYPE=${TPU_TYPE:-v5p-128}
SLICES=${SLICES:-1}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}

case "${1:-}" in
  create) create ;;
  status)
    gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" \
      --format='value(state.state)'
    ;;
  install) install ;;
  run) run "${@:2}" ;;
  logs)
    HOSTS=(--node=0 --worker=0)
    remote 'sudo docker logs --follow --tail=100 moepp'
    ;;
  stop) remote 'sudo docker stop moepp' ;;
  delete) gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force ;;
  *)
    echo "error: give one of create, status, install, run, logs, stop, delete, not '${1:-}'" >&2
    usage >&2
    exit 2
    ;;
esac
