#!/usr/bin/env bash
#SBATCH --job-name=slmjax-workers
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slmjax-workers-%A-%a.log
# Workers of a study as an array of jobs: each job is a worker for each of its GPUs. From the checkout, in an environment that has
# slmjax:
#
#   sbatch --array=0-7 tpu_scripts/slurm-workers.sh STUDY [options of slmjax ablate]
#   bash tpu_scripts/slurm-workers.sh --dry-run STUDY [options]     prints the command that each job would run
#
# The directory of results (--directory, default: runs/studies/...) must be on a file system that all nodes share. Jobs begin whenever
# they get a node. 120 seconds before its time is over a job is asked to save, and queues again, at most MAX_RESTARTS times (default:
# 20), as it does after a preemption; meanwhile another worker may resume its run.
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
  echo "slurm-workers.sh: name a study: sbatch tpu_scripts/slurm-workers.sh STUDY [options of slmjax ablate]" >&2
  exit 2
fi
# Slurm runs a copy of this file from a folder of its own. No srun: the signal is passed on once, by workers.sh.
workers=(bash "${SLURM_SUBMIT_DIR:-$PWD}/tpu_scripts/workers.sh" "$@")
if [[ $dry != 0 ]]; then
  printf -v line '%q ' "${workers[@]}"
  echo "${line% }"
  exit
fi
"${workers[@]}" &
pid=$!
trap 'kill -TERM "$pid" 2>/dev/null || true' TERM
status=0
wait "$pid" || status=$?
while kill -0 "$pid" 2>/dev/null; do # a signal ends the wait
  status=0
  wait "$pid" || status=$?
done
if ((status == 75 && ${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-20})); then
  scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$status"
