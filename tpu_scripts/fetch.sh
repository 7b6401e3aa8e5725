#!/usr/bin/env bash
# Copies the runs of this RUN_NAME into FETCH_TO/RUN_NAME on this machine: from the bucket, or from worker 0 where there is none.
#
#   fetch.sh --bucket BUCKET --run-name RUN_NAME [--to DIR] [options]
#   fetch.sh --name NAME --zone ZONE --runs-dir DIR [--to DIR] [options]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require RUN_NAME
runs=$(runs_on_host)

if [[ -n $BUCKET ]]; then
  run mkdir -p "$FETCH_TO/$RUN_NAME"
  run gcloud storage rsync --recursive "gs://$BUCKET/runs/$RUN_NAME" "$FETCH_TO/$RUN_NAME"
else
  require TPU_NAME TPU_ZONE
  run mkdir -p "$FETCH_TO"
  run gcloud compute tpus tpu-vm scp --recurse "$TPU_NAME:$runs" "$FETCH_TO/" "${PLACE[@]}" --worker=0
fi
