#!/usr/bin/env bash
# Shows what worker 0 prints, until Ctrl-C. The run does not notice.
#
#   follow.sh --name NAME --zone ZONE [options]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require TPU_NAME TPU_ZONE

on_hosts 0 "tail --lines=100 --follow=name --retry slmjax-job/console.log"
