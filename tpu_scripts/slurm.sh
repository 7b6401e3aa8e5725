#!/usr/bin/env bash
#SBATCH --job-name=slmjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slmjax-%j.log
# An example of a batch script for a cluster of GPUs. From the checkout, in an environment that has slmjax:
#
#   sbatch tpu_scripts/slurm.sh EXPERIMENT [options of slmjax train]
#   bash tpu_scripts/slurm.sh --dry-run EXPERIMENT [options]     prints the command that the job would run
#
# RUNS_DIR (default: runs) must be on a file system that all nodes share, RUN_NAME (default: the job's number) names the run in it.
# One process per GPU, each of which sees all GPUs of its node and takes the one that is its turn: give no --gpus-per-task.
# 120 seconds before its time is over the run is asked to save; the job then queues again, at most MAX_RESTARTS times (default: 20),
# as it does after a preemption, and the run goes on.
set -euo pipefail

dry=${DRY_RUN:-0}
case ${1:-} in
  -h | --help)
    awk 'NR > 1 && !/^#/ { exit } /^# / || /^#$/ { sub(/^# ?/, ""); print }' "$0"
    exit
    ;;
  --dry-run)
    dry=1
    shift
    ;;
esac
if (($# == 0)); then
  echo "slurm.sh: name an experiment: sbatch tpu_scripts/slurm.sh EXPERIMENT [options of slmjax train]" >&2
  exit 2
fi
# Slurm runs a copy of this file from a folder of its own.
host=${SLURM_SUBMIT_DIR:-$PWD}/tpu_scripts/host.sh
runs=${RUNS_DIR:-runs}/${RUN_NAME:-${SLURM_JOB_ID:-JOB}}

found=$(bash "$host" find "$runs") # once, before the processes start
read -ra words <<<"$found"
# srun does not take the CPUs of a task over from sbatch. A process that stops does not kill its peers, which still save.
srun=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=0)
case $found in
  '') train=("${srun[@]}" slmjax train "$@" --run.directory "$runs") ;;
  finished*)
    echo "$found"
    exit
    ;;
  *) train=("${srun[@]}" slmjax train "${words[@]}") ;;
esac
if [[ $dry != 0 ]]; then
  printf -v line '%q ' "${train[@]}"
  echo "${line% }"
  exit
fi
status=0
"${train[@]}" || status=$?
if ((status == 75 && ${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-20})); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
