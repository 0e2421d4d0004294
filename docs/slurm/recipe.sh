# Sourced by the scripts of this directory, with $recipe, $run and $here: the GPUs that a recipe needs, `check_engines`
# and `submit`.
# shellcheck shell=bash

nodes=${NODES:-1} # of train
gpus=${GPUS:-8}   # of each of these nodes
plan=$(opdctl train --recipe "$recipe" --output "$run" --dry-run --json)

gpus_of_engine() { # gpus_of_engine STAGE: 0 if its model is behind a server
  python3 -c 'import json, sys; print(json.loads(sys.argv[1])["gpus_per_engine"][sys.argv[2]])' "$plan" "$1"
}

# Options of sbatch, for a worker of rollout, one of score-teacher, and train
rollout_gpus=$(gpus_of_engine rollout) score_gpus=$(gpus_of_engine score)
rollout="--nodes=1 --gpus=$rollout_gpus ${ROLLOUT:---time=12:00:00}"
score="--nodes=1 --gpus=$score_gpus ${SCORE:---time=12:00:00}"
train="--nodes=$nodes --gpus-per-node=$gpus --exclusive ${TRAIN:---time=12:00:00}"

check_engines() { # engines on the GPUs of train: a node must have GPUs for whole ones
  local engine_gpus
  for engine_gpus in "$rollout_gpus" "$score_gpus"; do
    if ((engine_gpus && gpus % engine_gpus)); then
      echo "GPUS=$gpus on each node is no multiple of the $engine_gpus GPUs of an engine" >&2
      exit 2
    fi
  done
}

submit() { # submit STAGE LAUNCHER OPTIONS [ARGUMENTS]: print the number of the job
  # shellcheck disable=SC2086 # the options are several words
  sbatch --parsable --job-name="opdctl-$1" --signal=B:USR1@120 --requeue --open-mode=append $3 \
    "$here/job.sh" "$run" "$2" "$1" --recipe "$recipe" --output "$run" "${@:4}"
}
