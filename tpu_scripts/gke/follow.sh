#!/usr/bin/env bash
# Shows what the first host of the workload RUN_NAME prints, until Ctrl-C. (kubectl knows the cluster since xpk made it.)
#
#   gke/follow.sh --run-name NAME [options]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=../common.sh
source "$here/common.sh"
parse "$@"
require RUN_NAME

run kubectl logs --follow --tail=100 --all-containers \
  --selector="xpk.google.com/workload=$RUN_NAME,batch.kubernetes.io/job-completion-index=0"
