#!/usr/bin/env bash
# A run as a chain of Slurm jobs: for each step an array of rollout workers, an array of scoring workers and one update,
# each on a separate allocation.
#
#   bash docs/slurm/chain.sh RECIPE RUN_DIR FIRST_STEP LAST_STEP
#
# Every job waits for the previous one. After a failure or a time limit, run the same command again from the step that
# `opdctl status RUN_DIR` reports: finished parts are kept, and finished stages do nothing.
set -euo pipefail

recipe=$1 run=$2 first=$3 last=$4
rollout=${ROLLOUT:---gpus=1 --time=02:00:00 --requeue}
score=${SCORE:---gpus=4 --time=02:00:00 --requeue}
train=${TRAIN:---gpus=8 --time=01:00:00 --requeue}
workers=${WORKERS:-4} # they run the same command and share the parts; at most rollout.num_parts of them have work

after=()
submit() { # submit JOB OPTIONS COMMAND: the job waits for the previous one
  # shellcheck disable=SC2086 # the options are several words
  job=$(sbatch --parsable --job-name="opdctl-$1" --signal=B:USR1@60 "${after[@]}" $2 --wrap "exec $3")
  after=("--dependency=afterok:${job%%;*}")
}

for ((step = first; step <= last; step++)); do
  submit rollout "$rollout --array=0-$((workers - 1))" "opdctl rollout --recipe $recipe --output $run --step $step"
  submit score "$score --array=0-$((workers - 1))" "opdctl score-teacher --recipe $recipe --output $run --step $step"
  submit train "$train" "opdctl train --no-fill --recipe $recipe --output $run"
done
