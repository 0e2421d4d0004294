#!/usr/bin/env bash
# A run on allocations that stay: rollout, score-teacher and train each keep their model loaded and follow one another
# by the run directory, which all of them must see.
#
#   bash docs/slurm/follow.sh RECIPE RUN_DIR
#
# A minute before its time limit a job finishes or drops its part and goes back into the queue. Run the same command
# again after a failure: each stage goes on where it stopped, and what is finished does nothing.
set -euo pipefail

if [[ $1 == job ]]; then # on an allocation
  "${@:2}" &
  pid=$!
  trap 'kill -USR1 $pid' USR1
  while :; do # a signal ends a wait early
    wait $pid && code=0 || code=$?
    kill -0 $pid 2>/dev/null || break
  done
  if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$code"
fi

recipe=$1 run=$2
rollout=${ROLLOUT:---gpus=1 --time=12:00:00}
score=${SCORE:---gpus=4 --time=12:00:00}
train=${TRAIN:---gpus=1 --time=12:00:00}
workers=${WORKERS:-1} # of rollout and of score-teacher each, at most the recipe's rollout.num_parts

submit() { # submit STAGE OPTIONS
  # shellcheck disable=SC2086 # the options are several words
  sbatch --parsable --job-name="opdctl-$1" --signal=B:USR1@60 --requeue --open-mode=append $2 \
    "$0" job opdctl "$1" --follow --recipe "$recipe" --output "$run"
}

for ((worker = 0; worker < workers; worker++)); do # not an array, whose tasks have fixed parts
  submit rollout "$rollout"
  submit score-teacher "$score"
done
submit train "$train"
