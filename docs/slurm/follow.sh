#!/usr/bin/env bash
# A run as long-running Slurm jobs: rollout, score-teacher and train keep their models loaded and communicate through
# the run directory, which all of them must share.
#
#   bash docs/slurm/follow.sh RECIPE RUN_DIR
#
# A minute before its time limit a job stops and is requeued. After a failure, run the same command again: each stage
# resumes, and finished stages do nothing.
set -euo pipefail

if [[ $1 == job ]]; then # on an allocation
  "${@:2}" &
  pid=$!
  trap 'kill -USR1 $pid' USR1
  while :; do # a signal interrupts wait
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
workers=${WORKERS:-1} # of rollout and of score-teacher each; at most rollout.num_parts of them have work

submit() { # submit STAGE OPTIONS
  # shellcheck disable=SC2086 # the options are several words
  sbatch --parsable --job-name="opdctl-$1" --signal=B:USR1@60 --requeue --open-mode=append $2 \
    "$0" job opdctl "$1" --follow --recipe "$recipe" --output "$run"
}

submit rollout "$rollout --array=0-$((workers - 1))"
submit score-teacher "$score --array=0-$((workers - 1))"
submit train "$train"
