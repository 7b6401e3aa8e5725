#!/usr/bin/env bash
# Installs slmjax on every host, and mounts the bucket for runs there.
#
#   install.sh --name NAME --zone ZONE --bucket BUCKET [--source SOURCE] [options]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require TPU_NAME TPU_ZONE
runs_on_host >/dev/null

pack
on_hosts all "mkdir -p slmjax-job"
if [[ $PACKED == *://* ]]; then
  to_hosts "$here/host.sh"
  source=$PACKED
else
  to_hosts "$here/host.sh" "$PACKED"
  source=slmjax-job/${PACKED##*/}
fi
on_hosts all "$(quoted bash slmjax-job/host.sh install "$source")"
if [[ -n $BUCKET ]]; then on_hosts all "$(quoted bash slmjax-job/host.sh mount "$BUCKET" "$BUCKET_ON_HOST")"; fi
