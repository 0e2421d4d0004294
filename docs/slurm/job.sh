#!/usr/bin/env bash
# Runs opdctl on a Slurm allocation; the other scripts of this directory submit it:
#
#   sbatch OPTIONS job.sh RUN_DIR LAUNCHER COMMAND …
#
# LAUNCHER is the number of processes that torchrun starts on each node, 0 for one process without torchrun, or `ray` for a
# Ray cluster on all nodes and the command on the first. USR1, which Slurm sends before the time limit, stops the command.
# If training is unfinished then, the job is requeued, and resumes.
set -euo pipefail

run=$1 launcher=$2
command=(opdctl "${@:3}")
if [[ $launcher != 0 ]]; then
  first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  port=$((20000 + SLURM_JOB_ID % 10000))
fi

start_ray() { # start_ray SECONDS: return when all nodes have joined the cluster, or fail after this time
  export RAY_ADDRESS=$first_node:$port
  # shellcheck disable=SC2016 # each task expands its own variables
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    ((SLURM_NODEID)) || exec ray start --block --head --port="$2" --disable-usage-stats
    until (: < "/dev/tcp/$1/$2") 2> /dev/null; do sleep 1; done
    exec ray start --block --address="$1:$2"' bash "$first_node" "$port" &
  cluster=$!
  trap 'kill $cluster 2> /dev/null && wait $cluster || :' EXIT
  local count='import ray; ray.init(logging_level="error"); print(sum(node["Alive"] for node in ray.nodes()))'
  local end=$((SECONDS + $1))
  until [[ $(timeout 60 python3 -c "$count" 2> /dev/null) == "$SLURM_NNODES" ]]; do
    if ((SECONDS > end)) || ! kill -0 $cluster 2> /dev/null; then
      echo "no Ray cluster of $SLURM_NNODES nodes at $RAY_ADDRESS" >&2
      exit 1
    fi
    sleep 1
  done
}

case $launcher in
  0) ;;
  ray) start_ray 600 ;; # the command is no job step: Ray's processes would get its signals, too
  *) command=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun
    --nnodes="$SLURM_NNODES" --nproc-per-node="$launcher" --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID"
    --rdzv-endpoint="$first_node:$port"
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m "${command[@]}") ;;
esac

"${command[@]}" &
pid=$! stopped=
trap 'stopped=1; kill -USR1 $pid' USR1
trap 'kill -TERM $pid' TERM # of scancel and preemption, after which Slurm decides
while :; do # a signal interrupts wait
  wait $pid && code=0 || code=$?
  kill -0 $pid 2>/dev/null || break
done
# Not by the exit code: that of torchrun is 1 for any end but success.
if [[ $stopped ]] && ! opdctl status "$run" --json | grep -q '"is_finished": true'; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
