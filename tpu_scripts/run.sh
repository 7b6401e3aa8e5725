#!/usr/bin/env bash
# Starts an experiment on every host and returns; follow.sh shows it. If there is a run of this RUN_NAME already, that one goes on.
#
#   run.sh --name NAME --zone ZONE --bucket BUCKET [options] EXPERIMENT [options of slmjax train]
#   run.sh --name NAME --zone ZONE --bucket BUCKET --resume RUN_DIR [options] [-- options of slmjax train]
#
# EXPERIMENT is a name (nano) or a Python file on this machine. RUN_DIR is a path on the hosts.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require TPU_NAME TPU_ZONE
runs=$(runs_on_host)

if [[ -n ${RESUME:-} ]]; then
  train=(slmjax train --resume "$RESUME" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"})
else
  ((${#ARGUMENTS[@]})) || fail "name an experiment: run.sh [options] EXPERIMENT [options of slmjax train]"
  if [[ ${ARGUMENTS[0]} == *.py ]]; then
    to_hosts "${ARGUMENTS[0]}"
    ARGUMENTS[0]=slmjax-job/${ARGUMENTS[0]##*/}
  fi
  # Asked once, for all hosts: while one of them makes the run directory, another could find it and resume it.
  found=$(on_hosts 0 "$(quoted bash slmjax-job/host.sh find "$runs")")
  read -ra words <<<"$found"
  case $found in
    '') train=(slmjax train "${ARGUMENTS[@]}" --run.directory "$runs") ;;
    finished*)
      say "$found: for another run give another --run-name"
      train=(true)
      ;;
    *) train=(slmjax train "${words[@]}") ;;
  esac
fi
on_hosts all "$(quoted bash slmjax-job/host.sh start "$runs" "${train[@]}")"
