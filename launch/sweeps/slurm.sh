#!/usr/bin/env bash
# An experiment, a run to each task of a job array on one GPU each:
#
#   moepp experiments tau --scale=small --list        # says how many runs there are: 18
#   SHARED=/shared/moepp sbatch --array=0-17 launch/sweeps/slurm.sh tau --scale=small
#   moepp experiments tau --scale=small --report     # when they are through, or before
#   moepp experiments tau --scale=small --workdir=$SHARED/experiments  # once, after them, where an
#                                                      # experiment measures something of its runs
#
# SHARED is a folder that all nodes see: runs are in its experiments/, and go on where they were
# stopped. Rows are written into the project's folder, which all nodes see too, and in which the
# command is given; it runs in its .venv (or VENV). A task whose run has its row ends at once.
#
#SBATCH --job-name=moepp_sweep
#SBATCH --output=moepp_sweep-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [[ -z "${SHARED:-}" ]]; then
  echo "error: SHARED is not set: SHARED=/a/folder/all/nodes/see sbatch launch/sweeps/slurm.sh" >&2
  exit 2
fi
if [[ -z "${SLURM_JOB_ID:-}" || -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
  echo "error: this is a job array's script: sbatch --array=0-17 launch/sweeps/slurm.sh NAME" >&2
  exit 2
fi
python=${VENV:-.venv}/bin/python
if [[ ! -x "$python" ]]; then
  echo "error: there is no $python in $PWD: docs/PODS.md says how to make it, or set VENV" >&2
  exit 2
fi

# The run saves when it is told to end, and this script with it.
"$python" -m experiments.run "$@" --only="$SLURM_ARRAY_TASK_ID" \
  --workdir="$SHARED/experiments" &
child=$!
trap 'kill -TERM "$child"' TERM
status=0
wait "$child" || status=$?
if ((status == 143)); then
  wait "$child" || true
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" || echo "not requeued here" >&2
fi
exit "$status"
