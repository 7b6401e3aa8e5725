#!/usr/bin/env bash
# Starts workers of a study through SkyPilot: a pool RUN_NAME of WORKERS machines, and as many jobs, each of which trains what no other
# has claimed. A machine that is taken away is replaced. Called again, it submits the jobs again, for what is left.
#
#   skypilot-workers.sh --run-name NAME --workers N --nfs SERVER:/SHARE [options] STUDY [options of slmjax ablate]
#
# STUDY is a file of this checkout. Results are in SERVER:/SHARE/runs/RUN_NAME. The machines are those of skypilot-pool.yaml, and cost
# until `sky jobs pool down RUN_NAME`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require RUN_NAME WORKERS NFS
((${#ARGUMENTS[@]})) || fail "name a study: skypilot-workers.sh [options] STUDY [options of slmjax ablate]"

pool=$CHECKOUT/dist/skypilot/$RUN_NAME.yaml
run mkdir -p "${pool%/*}"
run sed -n -e "s|workers: 1|workers: $WORKERS|" -e "w $pool" "$here/skypilot-pool.yaml"
run sky jobs pool apply --yes --pool "$RUN_NAME" --env "NFS=$NFS" "$pool"
run sky jobs launch --yes --detach-run --pool "$RUN_NAME" --num-jobs "$WORKERS" --name "$RUN_NAME" --env "RUN_NAME=$RUN_NAME" \
  --env "STUDY=${ARGUMENTS[0]}" --env "OPTIONS=${ARGUMENTS[*]:1}" "$here/skypilot-worker.yaml"
