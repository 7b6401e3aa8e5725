#!/usr/bin/env bash
# Starts workers of a study as the Indexed Job RUN_NAME of the Kubernetes cluster that kubectl uses: WORKERS pods, one GPU each. A pod
# that is taken away or interrupted is replaced, at most MAX_RESTARTS times. Kueue admits them where KUEUE_QUEUE names a queue of it.
#
#   gke/run-workers.sh --run-name NAME --image IMAGE --claim CLAIM --workers N [--queue QUEUE] [options] STUDY [options of slmjax ablate]
#
# STUDY is a file in the image. Results are in /runs/RUN_NAME, on the volume of the claim. The job is tpu_scripts/gke/workers.yaml.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHECKOUT=$(dirname "$here")
# shellcheck source=../common.sh
source "$here/common.sh"
parse "$@"
require RUN_NAME WORKERS IMAGE RUNS_CLAIM
((${#ARGUMENTS[@]})) || fail "name a study: gke/run-workers.sh [options] STUDY [options of slmjax ablate]"

# One argument of the container for each word, as YAML and for sed.
words=''
for word in slmjax ablate "${ARGUMENTS[@]}" --directory "/runs/$RUN_NAME" --worker; do
  word=${word//\\/\\\\}
  words+="\"${word//\"/\\\"}\", "
done
words=${words%, }
words=${words//\\/\\\\}
words=${words//&/\\&}
job=$CHECKOUT/dist/gke/$RUN_NAME.yaml
run mkdir -p "${job%/*}"
run sed -n -e "s|RUN_NAME|$RUN_NAME|" -e "s|KUEUE_QUEUE|${KUEUE_QUEUE:-default}|" -e "s|NUM_WORKERS|$WORKERS|" \
  -e "s|MAX_RESTARTS|$MAX_RESTARTS|" -e "s|CONTAINER_IMAGE|$IMAGE|" -e "s|RUNS_CLAIM|$RUNS_CLAIM|" \
  -e "s|COMMAND_WORDS|${words//|/\\|}|" -e "w $job" "$here/gke/workers.yaml"
run kubectl apply --filename="$job"
