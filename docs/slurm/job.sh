#!/usr/bin/env bash
# Runs opdctl on a Slurm allocation; the other scripts of this directory submit it:
#
#   sbatch OPTIONS job.sh RUN_DIR PROCESSES COMMAND …
#
# torchrun starts PROCESSES on each node; 0 stands for one process without torchrun. USR1, which Slurm sends before the
# time limit, stops the command. If training is unfinished then, the job is requeued, and resumes.
set -euo pipefail

run=$1 processes=$2
command=(opdctl "${@:3}")
if ((processes)); then
  first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  command=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun
    --nnodes="$SLURM_NNODES" --nproc-per-node="$processes" --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID"
    --rdzv-endpoint="$first_node:$((20000 + SLURM_JOB_ID % 10000))"
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m "${command[@]}")
fi

"${command[@]}" &
pid=$! stopped=
trap 'stopped=1; kill -USR1 $pid' USR1
while :; do # a signal interrupts wait
  wait $pid && code=0 || code=$?
  kill -0 $pid 2>/dev/null || break
done
# Not by the exit code: that of torchrun is 1 for any end but success.
if [[ $stopped ]] && ! opdctl status "$run" --json | grep -q '"is_finished": true'; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
