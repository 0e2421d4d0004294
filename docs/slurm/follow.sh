#!/usr/bin/env bash
# A run as long-running Slurm jobs: rollout, score-teacher and train keep their models loaded and communicate through
# the run directory, which all of them must share. Each worker of the first two has the GPUs of one engine.
#
#   WORKERS=4 NODES=1 GPUS=8 bash docs/slurm/follow.sh RECIPE RUN_DIR
#
# Two minutes before its time limit a job stops and is requeued. After a failure, run the same command again: each stage
# resumes, and finished stages do nothing.
set -euo pipefail

recipe=$1 run=$2
workers=${WORKERS:-1} # of rollout and of score-teacher each; at most rollout.num_parts of them have work
here=$(cd "$(dirname "$0")" && pwd)
source "$here/recipe.sh"

submit rollout 0 "$rollout --array=0-$((workers - 1))" --follow
submit score-teacher 0 "$score --array=0-$((workers - 1))" --follow
submit train "$gpus" "$train" --follow
