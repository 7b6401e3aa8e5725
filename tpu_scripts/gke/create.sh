#!/usr/bin/env bash
# Creates a GKE cluster with one TPU slice through xpk, and attaches the bucket for runs to it.
#
#   gke/create.sh --cluster CLUSTER --zone ZONE --type TYPE --bucket BUCKET [--spot] [options]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=../common.sh
source "$here/common.sh"
parse "$@"
require GKE_CLUSTER TPU_ZONE TPU_TYPE BUCKET

capacity=--on-demand
if on "${TPU_SPOT:-}"; then capacity=--spot; fi
run xpk cluster create --cluster="$GKE_CLUSTER" "${PLACE[@]}" --tpu-type="$TPU_TYPE" --num-slices=1 "$capacity" \
  --enable-workload-identity --enable-gcsfuse-csi-driver
# The size is a formality: a bucket has none. Nothing is remembered about files: the other hosts change them.
run xpk storage attach slmjax-runs --cluster="$GKE_CLUSTER" "${PLACE[@]}" --type=gcsfuse --bucket="$BUCKET" --size=1000 \
  --mount-point="$BUCKET_IN_POD" --readonly=false --auto-mount=false \
  --mount-options=implicit-dirs,metadata-cache:ttl-secs:0
