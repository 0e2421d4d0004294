#!/usr/bin/env bash
# A run as one Slurm job over several nodes, with Ray: engines are actors, and the ranks of train are started by Ray Train.
#
#   NODES=4 GPUS=8 bash docs/slurm/ray.sh RECIPE RUN_DIR [OPTION …]
#
# Engines and trainer use the same GPUs, all of the job, in turn. For separate ones give their numbers, with the sum
# NODES × GPUS:
#
#   … --set pipeline.placement=apart --set hardware.rollout_gpus=16 --set hardware.score_gpus=8 --set hardware.train_gpus=8
#
# Two minutes before its time limit the job stops and is requeued. After a failure, run the same command again.
set -euo pipefail

recipe=$1 run=$2
here=$(cd "$(dirname "$0")" && pwd)
source "$here/recipe.sh"

check_engines
submit train ray "$train" --launcher ray \
  --set "hardware.train_gpus=$((nodes * gpus))" --set "hardware.gpus_per_node=$gpus" "${@:3}"
