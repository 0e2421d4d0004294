#!/usr/bin/env bash
# A run as one Slurm job over several nodes: all stages use the same GPUs, one after another.
#
#   NODES=4 GPUS=8 bash docs/slurm/colocated.sh RECIPE RUN_DIR
#
# Two minutes before its time limit the job stops and is requeued. After a failure, run the same command again.
set -euo pipefail

recipe=$1 run=$2
here=$(cd "$(dirname "$0")" && pwd)
source "$here/recipe.sh"

check_engines
submit train "$gpus" "$train"
