#!/usr/bin/env bash
# Lists the workloads of the cluster and their states.
#
#   gke/list.sh --cluster CLUSTER --zone ZONE [options]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=../common.sh
source "$here/common.sh"
parse "$@"
require GKE_CLUSTER TPU_ZONE

run xpk workload list --cluster="$GKE_CLUSTER" "${PLACE[@]}"
