#!/usr/bin/env bash
# Starts workers of a study on this machine, one for each chip of a TPU host or each GPU, and waits for them. Any number of machines
# that share the study's directory may do so at once: each worker trains what no other one has claimed.
#
#   workers.sh [--per chip|gpu|cpu] [--workers N] [--dry-run] STUDY [options of slmjax ablate]
#
#   --per KIND     what a worker has for itself (default: chips if there are any, else GPUs, else it shares the CPUs)
#   --workers N    number of workers (default: one for each chip or GPU, else 1)
#   --dry-run      prints the commands, one per line, and does nothing
#
# STUDY is a study file or the directory of a study that was begun. The directory of results (--directory) must be on a local disk, NFS
# or another file system with hard links: a bucket that is mounted by gcsfuse has none.
# Exit status: 0; 75 if a worker was interrupted (started again, it trains the rest); otherwise the first that is not 0.
# A signal is passed on to the workers: they save, release what they have claimed, and end.
set -euo pipefail

per=''
number=''
dry=${DRY_RUN:-0}
while (($#)); do
  case $1 in
    -h | --help)
      awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
      exit
      ;;
    --dry-run) dry=1 ;;
    --per=* | --workers=*)
      if [[ $1 == --per=* ]]; then per=${1#*=}; else number=${1#*=}; fi
      ;;
    --per | --workers)
      if (($# == 1)); then
        echo "workers.sh: $1 needs a value" >&2
        exit 2
      fi
      if [[ $1 == --per ]]; then per=$2; else number=$2; fi
      shift
      ;;
    *) break ;;
  esac
  shift
done
if (($# == 0)); then
  echo "workers.sh: name a study: workers.sh [--per chip|gpu|cpu] [--workers N] STUDY [options of slmjax ablate]" >&2
  exit 2
fi

# What there is. Slurm and others say in CUDA_VISIBLE_DEVICES which GPUs are theirs.
chips=()
for device in /dev/accel[0-9]* /dev/vfio/[0-9]*; do
  if [[ -e $device ]]; then chips+=("${#chips[@]}"); fi
done
gpus=()
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
  while read -r index; do gpus+=("$index"); done < <(nvidia-smi --query-gpu=index --format=csv,noheader)
fi
if [[ -z $per ]]; then
  per=cpu
  if ((${#gpus[@]})); then per=gpu; fi
  if ((${#chips[@]})); then per=chip; fi
fi
case $per in
  chip) devices=(${chips[@]+"${chips[@]}"}) ;;
  gpu) devices=(${gpus[@]+"${gpus[@]}"}) ;;
  cpu) devices=() ;;
  *)
    echo "workers.sh: --per is $per: give chip, gpu or cpu" >&2
    exit 2
    ;;
esac
if [[ -z $number ]]; then
  number=${#devices[@]}
  if [[ $per == cpu ]]; then number=1; fi
fi
if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
  echo "workers.sh: there is no $per for a worker: give the number of workers with --workers" >&2
  exit 2
fi

# command_of I: the command of worker I, from 0, as COMMAND. None joins the others to one run.
command_of() {
  local device=${devices[$1]:-$1} port=$((8476 + $1)) settings=(SLMJAX_DISTRIBUTED=off)
  case $per in
    chip)
      # A slice of one chip: without the bounds, a process waits for the other chips of the host, or takes all of them.
      settings+=(TPU_VISIBLE_CHIPS="$device" TPU_CHIPS_PER_PROCESS_BOUNDS="1,1,1" TPU_PROCESS_BOUNDS="1,1,1")
      settings+=(TPU_PROCESS_ADDRESSES="localhost:$port" TPU_PROCESS_PORT="$port" CLOUD_TPU_TASK_ID=0)
      settings+=(TPU_WORKER_ID=0 TPU_WORKER_HOSTNAMES=localhost ALLOW_MULTIPLE_LIBTPU_LOAD=1)
      ;;
    gpu) settings+=(CUDA_VISIBLE_DEVICES="$device") ;;
  esac
  COMMAND=(env "${settings[@]}" slmjax ablate "${@:2}" --worker)
}

pids=()
for ((i = 0; i < number; i++)); do
  command_of "$i" "$@"
  if [[ $dry != 0 ]]; then
    printf -v line '%q ' "${COMMAND[@]}"
    echo "${line% }"
    continue
  fi
  "${COMMAND[@]}" &
  pids+=($!)
done
if [[ $dry != 0 ]]; then exit; fi
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

status=0
for pid in "${pids[@]}"; do
  ended=0
  wait "$pid" || ended=$?
  # A signal ends the wait, not the worker.
  while kill -0 "$pid" 2>/dev/null; do
    ended=0
    wait "$pid" || ended=$?
  done
  if ((ended == 75 || (ended && !status))); then status=$ended; fi
done
exit "$status"
