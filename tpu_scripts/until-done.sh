#!/usr/bin/env bash
# Trains until the run is done: creates the machine, installs, runs, waits; when the machine is lost or the run was interrupted
# (exit status 75), deletes it, creates another and resumes. At the end fetches the run and deletes the machine, unless --keep.
# Started again, it takes up what it finds: a run that is going on is waited for.
#
#   until-done.sh --name NAME --zone ZONE --type TYPE --bucket BUCKET [options] EXPERIMENT [options of slmjax train]
#
# Exit status: 0 finished; 75 still not after MAX_RESTARTS (start it again to go on); otherwise that of the run (1 diverged, 2 error).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=common.sh
source "$here/common.sh"
parse "$@"
require TPU_NAME TPU_ZONE TPU_TYPE
runs_on_host >/dev/null
((${#ARGUMENTS[@]})) || fail "name an experiment: until-done.sh [options] EXPERIMENT [options of slmjax train]"

# settled_state ASSUMED: the state once it will not change by itself any more.
settled_state() {
  local state
  while state=$(tpu_state "$1"); do
    case $state in
      CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | STOPPING | DELETING | UNKNOWN) sleep "$POLL_SECONDS" ;;
      *) break ;;
    esac
  done
  printf '%s' "$state"
}

# One word for all hosts: lost, running, the exit status of the run, or unreachable. A host that was killed has stopped its peers;
# otherwise what some hosts came to waits until none runs.
run_status() {
  local answer
  answer=$(on_hosts all "bash slmjax-job/host.sh status") || true
  if dry; then answer="slmjax-job 0"; fi
  awk '
    function rank(word) {
      if (word == "running") return 4
      if (word !~ /^[0-9]+$/ || word + 0 > 127) return 5
      return word == 0 ? 1 : word == 75 ? 2 : 3
    }
    $1 == "slmjax-job" && rank($2) > most { most = rank($2); status = most == 5 ? "lost" : $2 }
    END { print most ? status : "unreachable" }
  ' <<<"$answer"
}

# The exit status of the run, 75 also where the machine was lost.
wait_for_run() {
  local status unreachable=0
  while status=$(run_status); do
    case $status in
      running) unreachable=0 ;;
      lost) return 75 ;;
      unreachable)
        unreachable=$((unreachable + 1))
        if ((unreachable == 10)) || [[ $(settled_state READY) != READY ]]; then return 75; fi
        ;;
      0 | 75) return "$status" ;;
      *) # so ends also a host whose peers were taken away a moment ago
        sleep "$POLL_SECONDS"
        if [[ $(settled_state READY) != READY ]]; then return 75; fi
        return "$status"
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# The run on one machine, from whatever state that is in. Called where set -e has no effect.
one_machine() {
  local state
  state=$(settled_state MISSING)
  if [[ $state != READY ]]; then
    if [[ $state != MISSING ]]; then "$here/delete.sh" || return 75; fi
    "$here/create.sh" || return 75
  elif [[ $(run_status) == running ]]; then
    say "$TPU_NAME runs already"
    wait_for_run
    return
  fi
  if "$here/install.sh" && "$here/run.sh" "${ARGUMENTS[@]}"; then
    wait_for_run
  elif [[ $(settled_state READY) == READY ]]; then
    return 2 # another machine would fail alike
  else
    return 75
  fi
}

delete() { if [[ $(settled_state READY) != MISSING ]]; then "$here/delete.sh"; fi; }

restarts=0
while :; do
  outcome=0
  one_machine || outcome=$?
  if ((outcome != 75 || restarts == MAX_RESTARTS)); then break; fi
  restarts=$((restarts + 1))
  say "$TPU_NAME was lost or interrupted: restart $restarts of at most $MAX_RESTARTS"
  delete || true
  sleep "$POLL_SECONDS"
done

if ! dry; then say "ended with status $outcome after $restarts restarts"; fi
if ! "$here/fetch.sh"; then
  say "the run was not fetched"
  if ((outcome == 0)); then outcome=2; fi
  if [[ -z $BUCKET ]]; then KEEP_TPU=1; fi # it may be nowhere else
fi
if on "${KEEP_TPU:-}"; then
  say "$TPU_NAME is kept, and costs until delete.sh deletes it"
elif ! delete; then
  say "$TPU_NAME could not be deleted, and costs until it is"
  if ((outcome == 0)); then outcome=2; fi
fi
exit "$outcome"
