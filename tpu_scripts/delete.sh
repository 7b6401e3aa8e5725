#!/usr/bin/env bash
# Deletes the TPU VM, or (--queued) the queued resource and the TPU VM it made. A run that is going on is not asked to save: stop.sh.
#
#   delete.sh --name NAME --zone ZONE [--queued] [options]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require TPU_NAME TPU_ZONE

if on "${TPU_QUEUED:-}"; then
  run gcloud compute tpus queued-resources delete "$TPU_NAME" "${PLACE[@]}" --force --quiet
else
  run gcloud compute tpus tpu-vm delete "$TPU_NAME" "${PLACE[@]}" --quiet
fi
