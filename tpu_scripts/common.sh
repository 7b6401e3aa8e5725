# shellcheck shell=bash
# Settings, each a variable of the environment and an option (the option wins):
#   TPU_NAME            --name NAME           the TPU VM, and its queued resource
#   TPU_ZONE            --zone ZONE           its zone, such as us-west4-a
#   TPU_PROJECT         --project PROJECT     its project (default: gcloud's own setting)
#   TPU_TYPE            --type TYPE           accelerator and size, such as v5litepod-16
#   TPU_VERSION         --version VERSION     runtime version (default: the usual one of the type)
#   TPU_SPOT=1          --spot                spot capacity: cheaper, and taken away at any time
#   TPU_QUEUED=1        --queued              wait in the queue for capacity instead of failing when there is none
#   TPU_CREATE_OPTIONS  --create-options "…"  more options for gcloud's create command, split at spaces
#   SLMJAX_SOURCE       --source SOURCE       what is installed: a checkout (default: this one), a wheel, or a URL for pip
#   BUCKET              --bucket NAME         bucket for run directories, which install.sh mounts on every host
#   RUNS_DIR            --runs-dir DIR        instead of a bucket: a directory on the hosts that all of them share
#   RUN_NAME            --run-name NAME       names the run among those (default: TPU_NAME); another name, another run
#   FETCH_TO            --to DIR              where fetch.sh puts runs on this machine (default: runs)
#   POLL_SECONDS        --poll-seconds N      seconds between two looks at a state (default: 60)
#   MAX_RESTARTS        --max-restarts N      how often a lost machine is replaced (default: 20)
#   KEEP_TPU=1          --keep                until-done.sh leaves the machine in place at the end
#   GKE_CLUSTER         --cluster NAME        the cluster that the scripts in gke/ use
#   WORKERS             --workers N           number of workers of a study (gke/run-workers.sh, skypilot-workers.sh)
#   IMAGE               --image IMAGE         container image with slmjax and the study (gke/run-workers.sh)
#   RUNS_CLAIM          --claim CLAIM         claim of the volume for runs, which all pods may write to (gke/run-workers.sh)
#   KUEUE_QUEUE         --queue QUEUE         local queue of Kueue that admits the workers (gke/run-workers.sh; default: default)
#   NFS                 --nfs SERVER:/SHARE   file server for runs, which all machines mount (skypilot-workers.sh)
#   DRY_RUN=1           --dry-run             print the commands, one per line and quoted for a shell, and do nothing
#
# Sourced by the scripts beside it; it does nothing by itself.

# shellcheck disable=SC2034 # read by the scripts that source this one
readonly BUCKET_ON_HOST=slmjax-job/bucket # below the home directory, so that mounting it takes no root
readonly BUCKET_IN_POD=/mnt/slmjax
exec 3>&1 # where dry runs print, even while an answer is being captured

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() {
  say "$@"
  exit 2
}

usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
  echo
  awk 'NR > 1 && /^#$/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"
}

variable_of() {
  case $1 in
    --name) echo TPU_NAME ;;
    --zone) echo TPU_ZONE ;;
    --project) echo TPU_PROJECT ;;
    --type) echo TPU_TYPE ;;
    --version) echo TPU_VERSION ;;
    --create-options) echo TPU_CREATE_OPTIONS ;;
    --source) echo SLMJAX_SOURCE ;;
    --bucket) echo BUCKET ;;
    --runs-dir) echo RUNS_DIR ;;
    --run-name) echo RUN_NAME ;;
    --to) echo FETCH_TO ;;
    --poll-seconds) echo POLL_SECONDS ;;
    --max-restarts) echo MAX_RESTARTS ;;
    --cluster) echo GKE_CLUSTER ;;
    --workers) echo WORKERS ;;
    --image) echo IMAGE ;;
    --claim) echo RUNS_CLAIM ;;
    --queue) echo KUEUE_QUEUE ;;
    --nfs) echo NFS ;;
    --resume) echo RESUME ;;
    *) fail "there is no option $1: see --help" ;;
  esac
}

# Options before the first other word are settings; that word and what follows are left in ARGUMENTS.
parse() {
  local variable
  unset RESUME # an option only
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit
        ;;
      --)
        shift
        break
        ;;
      --spot) export TPU_SPOT=1 ;;
      --queued) export TPU_QUEUED=1 ;;
      --keep) export KEEP_TPU=1 ;;
      --dry-run) export DRY_RUN=1 ;;
      --*=*)
        variable=$(variable_of "${1%%=*}")
        export "$variable=${1#*=}"
        ;;
      --*)
        variable=$(variable_of "$1")
        (($# > 1)) || fail "$1 needs a value"
        export "$variable=$2"
        shift
        ;;
      *) break ;;
    esac
    shift
  done
  ARGUMENTS=("$@")
  # A child script takes the same settings from the environment, so none of its own options change them.
  : "${RUN_NAME:=${TPU_NAME:-}}" "${POLL_SECONDS:=60}" "${MAX_RESTARTS:=20}" "${FETCH_TO:=runs}" "${SLMJAX_SOURCE:=$CHECKOUT}"
  BUCKET=${BUCKET:-}
  BUCKET=${BUCKET#gs://}
  PLACE=(--zone="${TPU_ZONE:-}")
  if [[ -n ${TPU_PROJECT:-} ]]; then PLACE+=(--project="$TPU_PROJECT"); fi
}

# require VARIABLE...: an error that names each way to give what is missing.
require() {
  local variable option
  for variable in "$@"; do
    [[ -z ${!variable:-} ]] || continue
    option=$(sed -n "s/^#   $variable *\(--[a-z-]* [A-Z]*\).*/\1/p" "${BASH_SOURCE[0]}")
    fail "$variable is not set: give $option, or set the variable"
  done
}

on() { [[ -n ${1:-} && $1 != 0 ]]; }
dry() { on "${DRY_RUN:-}"; }

quoted() {
  local words
  printf -v words '%q ' "$@"
  printf '%s' "${words% }"
}

run() {
  if dry; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    "$@"
  fi
}

# Where the runs of this RUN_NAME are on the hosts. A path is a word of the hosts' command lines: no spaces.
runs_on_host() {
  [[ -z $BUCKET || -z ${RUNS_DIR:-} ]] || fail "BUCKET (--bucket) and RUNS_DIR (--runs-dir) are both set: give one of them"
  [[ -n $BUCKET || -n ${RUNS_DIR:-} ]] ||
    fail "neither BUCKET nor RUNS_DIR is set: give --bucket NAME, or --runs-dir DIR of a directory that all hosts share"
  local runs=${RUNS_DIR:-$BUCKET_ON_HOST/runs}/$RUN_NAME
  [[ $runs != *[[:space:]]* ]] || fail "RUNS_DIR and RUN_NAME may hold no spaces: $runs"
  printf '%s' "$runs"
}

# on_hosts WORKER COMMAND: WORKER is a number or "all".
on_hosts() { run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${PLACE[@]}" --worker="$1" --command="$2"; }
to_hosts() { run gcloud compute tpus tpu-vm scp "$@" "$TPU_NAME:slmjax-job/" "${PLACE[@]}" --worker=all; }

# pack: what SLMJAX_SOURCE names, as PACKED: a file to be copied to the hosts, or a URL.
pack() {
  case $SLMJAX_SOURCE in
    *://*) PACKED=$SLMJAX_SOURCE ;;
    *.whl) PACKED=$SLMJAX_SOURCE ;;
    *)
      [[ -f $SLMJAX_SOURCE/pyproject.toml ]] ||
        fail "SLMJAX_SOURCE (--source) is $SLMJAX_SOURCE: give a checkout of slmjax, a wheel, or a URL such as git+https://…"
      PACKED=$SLMJAX_SOURCE/dist/slmjax-source.tar.gz
      run mkdir -p "$SLMJAX_SOURCE/dist"
      run tar -czf "$PACKED" -C "$SLMJAX_SOURCE" --exclude=__pycache__ pyproject.toml README.md LICENSE slmjax experiments
      ;;
  esac
}

# tpu_state ASSUMED: the state of the TPU VM, in gcloud's words, or
#   MISSING   there is none
#   LOST      only the request is left of it: deleted, it can be made again
#   CREATING  it waits in the queue, or is on its way
#   UNKNOWN   gcloud could not tell
# A dry run asks nothing and assumes.
tpu_state() {
  local request=ACTIVE node
  if on "${TPU_QUEUED:-}"; then
    if [[ $1 == MISSING ]]; then request=MISSING; fi
    request=$(describe queued-resources "value(state.state)" "$request")
  fi
  case $request in
    ACTIVE)
      node=$(describe tpu-vm "value(state)" "$1")
      if on "${TPU_QUEUED:-}" && [[ $node == MISSING ]]; then node=LOST; fi
      printf '%s' "$node"
      ;;
    FAILED | SUSPENDING | SUSPENDED) printf LOST ;;
    MISSING | UNKNOWN | DELETING) printf '%s' "$request" ;;
    *) printf CREATING ;;
  esac
}

describe() {
  local error
  local command=(gcloud compute tpus "$1" describe "$TPU_NAME" "${PLACE[@]}" --format="$2")
  if dry; then
    run "${command[@]}"
    printf '%s' "$3"
  elif { error=$("${command[@]}" 2>&1 1>&4); } 4>&1; then
    return
  elif [[ $error == *NOT_FOUND* ]]; then
    printf MISSING
  else
    say "$error"
    printf UNKNOWN
  fi
}
