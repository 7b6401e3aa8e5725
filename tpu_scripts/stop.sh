#!/usr/bin/env bash
# Asks the run to save and stop, on all hosts after the same step. run.sh goes on with it.
#
#   stop.sh --name NAME --zone ZONE [options]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require TPU_NAME TPU_ZONE

on_hosts all "bash slmjax-job/host.sh stop"
