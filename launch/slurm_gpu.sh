#!/usr/bin/env bash
# MoE++ 7B on 8 nodes of 8 GPUs:
#
#   SHARED=/shared/moepp sbatch launch/slurm_gpu.sh [FLAG...]
#
# SHARED is a folder that all nodes see, with corpus/, prepared/ and runs/; the command is given in
# the project's folder, which all nodes see too, and runs in its .venv (or VENV). FLAGs are added
# to the training command.
#
#SBATCH --job-name=moepp_7b
#SBATCH --output=moepp_7b-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#
# JAX takes the coordinator and the numbers of the processes from SLURM, and gives each task the GPU
# of its number on the node: hence one task a GPU, all GPUs of the node visible to each.
# SIGTERM, at preemption or 120 s before the time limit, lets the run save; it ends with status 143.
# A run that hangs ends with status 75, and is requeued up to 20 times.
set -euo pipefail

if [[ -z "${SHARED:-}" ]]; then
  echo "error: SHARED is not set: SHARED=/a/folder/all/nodes/see sbatch launch/slurm_gpu.sh" >&2
  exit 2
fi
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  echo "error: this is a job script: sbatch launch/slurm_gpu.sh" >&2
  exit 2
fi
python=${VENV:-.venv}/bin/python
if [[ ! -x "$python" ]]; then
  echo "error: there is no $python in $PWD: docs/PODS.md says how to make it, or set VENV" >&2
  exit 2
fi

# Processes end each other; one that srun killed for another's error would count as asked to stop.
status=0
srun --kill-on-bad-exit=0 --gpu-bind=none \
  "$python" -m moepp_jax.main train --config=moepp_7b \
  --workdir="$SHARED/runs/moepp_7b" --distributed=on \
  --config.data.sources.text.path="$SHARED/corpus" --config.data.dir="$SHARED/prepared" \
  --config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.expert=8 \
  --config.model.remat=exchanged "$@" || status=$?

if ((status == 143)); then
  # A preempted job is requeued by SLURM itself; one at its time limit has to ask.
  scontrol requeue "$SLURM_JOB_ID" || echo "not requeued here (status $status)" >&2
elif ((status == 75 && ${SLURM_RESTART_COUNT:-0} < 20)); then
  scontrol requeue "$SLURM_JOB_ID" || echo "not requeued here (status $status)" >&2
fi
exit "$status"
