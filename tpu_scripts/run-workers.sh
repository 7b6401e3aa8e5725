#!/usr/bin/env bash
# Starts workers of a study on every host of a TPU VM, one for each chip, and returns; follow.sh shows them, stop.sh asks them to save
# and stop. Several TPU VMs may work on one study: all with the same --runs-dir and --run-name, each after its own create.sh and
# install.sh.
#
#   run-workers.sh --name NAME --zone ZONE --runs-dir DIR --run-name STUDY [options] STUDY.py [options of slmjax ablate]
#
# STUDY.py is a file on this machine. Results are in RUNS_DIR/RUN_NAME, on a file system with hard links, such as Filestore: workers
# claim their work there, which a bucket does not allow.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require TPU_NAME TPU_ZONE
[[ -z $BUCKET ]] || fail "BUCKET (--bucket) is set: workers cannot claim work in a bucket. Give --runs-dir DIR of a mounted Filestore"
require RUNS_DIR
runs=$(runs_on_host)
((${#ARGUMENTS[@]})) || fail "name a study: run-workers.sh [options] STUDY.py [options of slmjax ablate]"

files=("$here/workers.sh")
if [[ ${ARGUMENTS[0]} == *.py ]]; then
  files+=("${ARGUMENTS[0]}")
  ARGUMENTS[0]=slmjax-job/${ARGUMENTS[0]##*/}
  ARGUMENTS+=(--directory "$runs")
fi
to_hosts "${files[@]}"
workers=(bash slmjax-job/workers.sh --per chip "${ARGUMENTS[@]}")
on_hosts all "$(quoted bash slmjax-job/host.sh start "$runs" "${workers[@]}")"
