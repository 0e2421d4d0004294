#!/usr/bin/env bash
# A run as Slurm jobs. Each step is an array of rollouts, an array of scores and one update, each on its own allocation:
#
#   bash docs/slurm/chain.sh RECIPE RUN_DIR FIRST_STEP LAST_STEP
#
# Every job waits for the one before. After a failure or a time limit run the same command again from the step that
# `opdctl status RUN_DIR` names: finished parts are kept, and what is finished does nothing.
set -euo pipefail

recipe=$1 run=$2 first=$3 last=$4
rollout=${ROLLOUT:---gpus=1 --time=02:00:00 --requeue}
score=${SCORE:---gpus=4 --time=02:00:00 --requeue}
train=${TRAIN:---gpus=8 --time=01:00:00 --requeue}
workers=${WORKERS:-4} # at most the recipe's rollout.num_parts

after=()
submit() { # submit JOB OPTIONS COMMAND: waits for the job before it, and becomes the one to wait for
  # shellcheck disable=SC2086 # the options are several words
  job=$(sbatch --parsable --job-name="opdctl-$1" --signal=B:USR1@60 "${after[@]}" $2 --wrap "exec $3")
  after=("--dependency=afterok:${job%%;*}")
}

for ((step = first; step <= last; step++)); do
  submit rollout "$rollout --array=0-$((workers - 1))" "opdctl rollout --recipe $recipe --output $run --step $step"
  submit score "$score --array=0-$((workers - 1))" "opdctl score-teacher --recipe $recipe --output $run --step $step"
  submit train "$train" "opdctl train --no-fill --recipe $recipe --output $run"
done
