#!/usr/bin/env bash
# Deletes the workload RUN_NAME, or the whole cluster. Run directories stay in the bucket; ../fetch.sh copies them.
#
#   gke/delete.sh --cluster CLUSTER --zone ZONE --run-name NAME [options] workload
#   gke/delete.sh --cluster CLUSTER --zone ZONE [options] cluster
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=../common.sh
source "$here/common.sh"
parse "$@"
require GKE_CLUSTER TPU_ZONE

case ${ARGUMENTS[0]:-} in
  workload)
    require RUN_NAME
    run xpk workload delete --cluster="$GKE_CLUSTER" "${PLACE[@]}" --workload="$RUN_NAME" --force
    ;;
  cluster) run xpk cluster delete --cluster="$GKE_CLUSTER" "${PLACE[@]}" --force ;;
  *) fail "say what to delete: workload or cluster" ;;
esac
