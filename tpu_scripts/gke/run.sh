#!/usr/bin/env bash
# Starts an experiment as the workload RUN_NAME on every host of the cluster. GKE starts it again, at most MAX_RESTARTS times, when
# a host is taken away or the run was interrupted (exit status 75); it then goes on with its run directory.
#
#   gke/run.sh --cluster CLUSTER --zone ZONE --type TYPE --run-name NAME [options] EXPERIMENT [options of slmjax train]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=../common.sh
source "$here/common.sh"
parse "$@"
require GKE_CLUSTER TPU_ZONE TPU_TYPE RUN_NAME
((${#ARGUMENTS[@]})) || fail "name an experiment: gke/run.sh [options] EXPERIMENT [options of slmjax train]"

# xpk puts a whole folder into the image: one that holds what is needed, and nothing else.
image=$CHECKOUT/dist/gke
pack
files=("$here/host.sh")
source=$PACKED
if [[ $PACKED != *://* ]]; then
  files+=("$PACKED")
  source=${PACKED##*/}
fi
if [[ ${ARGUMENTS[0]} == *.py ]]; then
  files+=("${ARGUMENTS[0]}")
  ARGUMENTS[0]=${ARGUMENTS[0]##*/}
fi
run rm -rf "$image"
run mkdir -p "$image"
run cp "${files[@]}" "$image"
# exec: the signal that a host is going away reaches slmjax, which saves.
pod_command="$(quoted bash host.sh install "$source") && exec $(quoted bash host.sh train "$BUCKET_IN_POD/runs/$RUN_NAME" "${ARGUMENTS[@]}")"
run xpk workload create --cluster="$GKE_CLUSTER" "${PLACE[@]}" --workload="$RUN_NAME" --tpu-type="$TPU_TYPE" --num-slices=1 \
  --base-docker-image=python:3.12 --script-dir="$image" --storage=slmjax-runs \
  --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=75 --termination-grace-period-seconds=120 --command="$pod_command"
