#!/usr/bin/env bash
# What is done on the hosts themselves. The other scripts copy this one there and call it; it knows nothing of any cloud.
#
#   host.sh install SOURCE           slmjax for TPUs into ~/slmjax-job/venv, from a directory, a .tar.gz of one, a wheel or a URL
#   host.sh mount BUCKET DIR         mounts a Cloud Storage bucket
#   host.sh find RUNS                words for `slmjax train` to go on with the newest run in RUNS; "finished RUN_DIR" if that is at
#                                    its end; nothing where there is none
#   host.sh start RUNS COMMAND...    starts the command, which outlives the connection; its output goes to ~/slmjax-job/console.log
#   host.sh status                   "slmjax-job running", its exit status, "lost" if it was killed, or "none"
#   host.sh stop                     asks the command to save and stop
#   host.sh train RUNS OPTION...     goes on with the newest run in RUNS, or begins one; in the foreground
set -euo pipefail

job=$HOME/slmjax-job
PATH=$job/venv/bin:$PATH

install() {
  local source=$1
  mkdir -p "$job"
  case $source in
    *://*) ;;
    *.tar.gz)
      rm -rf "$job/source"
      mkdir "$job/source"
      tar -xzf "$source" -C "$job/source"
      source=file://$job/source
      ;;
    *) source=file://$(realpath "$source") ;;
  esac
  # uv brings a Python that is new enough, whatever the image has.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  [[ -x $job/venv/bin/python ]] || python3 -m uv venv --python 3.12 "$job/venv"
  python3 -m uv pip install --python "$job/venv/bin/python" --reinstall-package slmjax "slmjax[tpu] @ $source"
}

mount() {
  local bucket=$1 directory=$2
  if mountpoint --quiet "$directory"; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
    curl --fail --silent --show-error "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release --codename --short) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update
    sudo apt-get install --yes gcsfuse
  fi
  mkdir -p "$directory"
  # Nothing is remembered about files: the other hosts change them.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" "$directory"
}

find_run() {
  local newest='' config directory
  for config in "$1"/*/config.json; do
    if [[ -f $config && (-z $newest || $config -nt $newest) ]]; then newest=$config; fi
  done
  if [[ -z $newest ]]; then return; fi
  directory=${newest%/config.json}
  if finished "$directory"; then
    echo "finished $directory"
  elif [[ -f $directory/experiment.py ]]; then # classes of its own: the settings cannot be read without them
    echo "--resume $directory --code $directory/experiment.py"
  else
    echo "--resume $directory"
  fi
}

finished() {
  [[ -f $1/result.json ]] && python3 - "$1" <<'PYTHON'
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
result, config = (json.loads((run / name).read_text()) for name in ("result.json", "config.json"))
sys.exit(not (result["status"] == "finished" and result["step"] >= config["run"]["steps"]))
PYTHON
}

start() {
  mkdir -p "$job"
  if [[ $(status) == "slmjax-job running" ]]; then
    echo "host.sh: a command is running already: see $job/console.log, or stop it" >&2
    return 2
  fi
  rm -f "$job/status"
  # A session of its own, and no stream of the connection: it goes on when the connection is closed or lost.
  setsid nohup bash "$0" supervise "$@" >>"$job/console.log" 2>&1 </dev/null &
  echo $! >"$job/pid"
}

supervise() {
  local runs=$1 status=0
  shift
  trap : TERM # a machine that shuts down signals everyone: this script stays to write down how the command ended
  mkdir -p "$runs"
  "$@" || status=$?
  cp "$job/console.log" "$runs/console-$(hostname).log" || true
  echo "$status" >"$job/status.new"
  mv "$job/status.new" "$job/status"
}

status() {
  local word=none
  if [[ -f $job/status ]]; then
    word=$(<"$job/status")
  elif [[ -f $job/pid ]]; then
    word=lost
    if kill -0 "$(<"$job/pid")" 2>/dev/null; then word=running; fi
  fi
  echo "slmjax-job $word"
}

stop() { pkill -TERM --parent "$(<"$job/pid")"; }

# For places where nothing decides for all hosts. They decide alike all the same: a run directory is made only after all processes
# have joined, and each joins after it has looked here.
train() {
  local runs=$1 found words
  shift
  found=$(find_run "$runs")
  read -ra words <<<"$found"
  case $found in
    '') exec slmjax train "$@" --run.directory "$runs" ;;
    finished*) echo "$found" ;;
    *) exec slmjax train "${words[@]}" ;;
  esac
}

command=${1:-help}
shift || true
case $command in
  install | mount | start | supervise | status | stop | train) "$command" "$@" ;;
  find) find_run "$@" ;;
  *)
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
    [[ $command == *help ]]
    ;;
esac
