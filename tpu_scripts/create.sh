#!/usr/bin/env bash
# Creates a TPU VM, at once or (--queued) when the queue comes to it, and returns when it is ready.
#
#   create.sh --name NAME --zone ZONE --type TYPE [--spot] [--queued] [options]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require TPU_NAME TPU_ZONE TPU_TYPE

if [[ -z ${TPU_VERSION:-} ]]; then
  case $TPU_TYPE in
    v6e-*) TPU_VERSION=v2-alpha-tpuv6e ;;
    v5p-*) TPU_VERSION=v2-alpha-tpuv5 ;;
    v5litepod-*) TPU_VERSION=v2-alpha-tpuv5-lite ;;
    v[234]-*) TPU_VERSION=tpu-ubuntu2204-base ;;
    *) fail "no runtime version is known for $TPU_TYPE: give --version, or set TPU_VERSION" ;;
  esac
fi
read -ra options <<<"${TPU_CREATE_OPTIONS:-}"
if on "${TPU_SPOT:-}"; then options+=(--spot); fi

if ! on "${TPU_QUEUED:-}"; then
  run gcloud compute tpus tpu-vm create "$TPU_NAME" "${PLACE[@]}" --accelerator-type="$TPU_TYPE" --version="$TPU_VERSION" \
    ${options[@]+"${options[@]}"}
  exit
fi
run gcloud compute tpus queued-resources create "$TPU_NAME" "${PLACE[@]}" --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" \
  --runtime-version="$TPU_VERSION" ${options[@]+"${options[@]}"}
while state=$(tpu_state READY) && [[ $state == CREATING || $state == UNKNOWN ]]; do
  say "$TPU_NAME waits for capacity"
  sleep "$POLL_SECONDS"
done
if [[ $state != READY ]]; then
  say "$TPU_NAME is $state instead of ready"
  exit 1
fi
