#!/usr/bin/env bash
# A run as a chain of Slurm jobs: for each step an array of rollout workers, an array of scoring workers and one update,
# each on a separate allocation.
#
#   WORKERS=4 NODES=1 GPUS=8 bash docs/slurm/chain.sh RECIPE RUN_DIR FIRST_STEP LAST_STEP
#
# Every job waits for the previous one. After a failure, run the same command again from the step that
# `opdctl status RUN_DIR` reports: finished parts are kept, and finished stages do nothing.
set -euo pipefail

recipe=$1 run=$2 first=$3 last=$4
workers=${WORKERS:-4} # they run the same command and share the parts; at most rollout.num_parts of them have work
here=$(cd "$(dirname "$0")" && pwd)
source "$here/recipe.sh"

after=
submit_next() { # submit_next STAGE LAUNCHER OPTIONS [ARGUMENTS]: the job waits for the previous one
  job=$(submit "$1" "$2" "$3 $after" "${@:4}")
  after=--dependency=afterok:${job%%;*}
}

for ((step = first; step <= last; step++)); do
  submit_next rollout 0 "$rollout --array=0-$((workers - 1))" --step "$step"
  submit_next score-teacher 0 "$score --array=0-$((workers - 1))" --step "$step"
  submit_next train "$gpus" "$train" --no-fill
done
