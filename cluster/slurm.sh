#!/usr/bin/env bash
# stemtune under Slurm: a Ray of the job's own over all its nodes, one sweep per array task.
#
#   sbatch cluster/slurm.sh search_spaces/architectures.yaml --set data.store=/shared/linio2.h5
#   sbatch --array=0-2 cluster/slurm.sh search_spaces/cnn_study.yaml --set data.store=/shared/linio2.h5    # a sweep per seed
#
# Submit in the checkout's folder. A sweep is called after its space (and array task), or STEMTUNE_NAME; where there is
# an unfinished one of that name it goes on. Before the time is over, or when another job takes the nodes, the sweep
# stops in order, the job goes back to the queue, and later goes on with what is left.
# CHANGE the next lines and the first ones of cluster/environment.sh; put site and account options here too.
#SBATCH --job-name=stemtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
##SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=stemtune-%A_%a.log
set -uo pipefail

export STEMTUNE_SRC="${STEMTUNE_SRC:-$SLURM_SUBMIT_DIR}"
. "$STEMTUNE_SRC/cluster/environment.sh"
say() { echo "stemtune: $(date +%T) $*" >&2; }
fail() { say "$*"; exit 2; }

# One name per array task, the same after a requeue.
space="${1:-search_spaces/smoke.yaml}"
[ $# -eq 0 ] || shift
name="${STEMTUNE_NAME:-$(basename "${space%.*}")}"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    name="$name-$SLURM_ARRAY_TASK_ID"
    set -- "$@" --set "train.seed=$SLURM_ARRAY_TASK_ID"
fi
mkdir -p "$STEMTUNE_SWEEPS" || fail "cannot write to $STEMTUNE_SWEEPS; change STEMTUNE_SHARED in cluster/environment.sh"
if grep -qs '"status": "finished"' "$STEMTUNE_SWEEPS/$name/sweep.json"; then
    say "the sweep $name is finished already"
    exit 0
elif [ -e "$STEMTUNE_SWEEPS/$name/sweep.json" ]; then
    set -- --resume "$name"
else
    set -- "$space" --name "$name" "$@"
fi

# A token of the job's own, on the shared folder, readable by its owner alone: nobody else can join this Ray.
job="$STEMTUNE_SHARED/jobs/$SLURM_JOB_ID"
(umask 077 && mkdir -p "$job" && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$job/token") ||
    fail "cannot write to $job"
export RAY_AUTH_TOKEN_PATH="$job/token"
trap 'rm -rf "$job"' EXIT

# The first node is the head; its address as the other nodes see it. Ports of the job's own; a sweep has its own
# records and needs none of Ray's dashboard, log reader and autoscaler, which are a process each.
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | tr ' ' '\n' | grep -v '^127\.' | head -n 1)"
[ -n "$address" ] || fail "$head has no address but 127.0.0.1; set it in its /etc/hosts"
port=$((20000 + SLURM_JOB_ID % 1000 * 10))
options="--node-manager-port=$((port + 1)) --object-manager-port=$((port + 2)) --runtime-env-agent-port=$((port + 3))
    --dashboard-agent-grpc-port=$((port + 4)) --dashboard-agent-listen-port=$((port + 5))
    --metrics-export-port=$((port + 6))
    --include-log-monitor=false --num-cpus=${SLURM_CPUS_PER_TASK:-1}"
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-600}"

# What the head node runs once Ray is there. The process id is kept so that a signal reaches the sweep alone, the exit
# code because symmetric-run gives 0 when Ray did not start.
sweep() {
    python -m stemtune.sweep --nodes "$SLURM_NNODES" "$@" &
    echo $! >"$job/driver"
    wait $!
    local code=$?
    echo "$code" >"$job/code"
    return "$code"
}
# symmetric-run starts Ray on every node, the sweep on the head node when all have come, and stops Ray. Ray gives up where
# a busy node takes more than seconds to start its helpers, or a node is ahead of the head; such nodes try again for as
# long as the head waits for them. One that gives up ends the job.
node() {
    [ "$SLURM_NODEID" -ne 0 ] || options="$options --include-dashboard=false --no-monitor"
    local end=$((SECONDS + RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT))
    while [ "$SECONDS" -lt "$end" ]; do
        [ ! -e "$job/code" ] || return 0
        ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_NNODES" $options $STEMTUNE_RAY_OPTIONS -- \
            bash -c 'sweep "$@"' sweep "$@" || [ ! -e "$job/code" ] || return
        sleep 3
    done
    return 1
}
export -f sweep node
export job address port options
# Since Slurm 22.05 srun does not take over --cpus-per-task of the job: without it Ray would be bound to one core.
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'node "$@"' node "$@" &
step=$!

stop_and_requeue() {
    trap '' USR1 TERM
    say "the nodes are wanted back: stopping the sweep $name, which goes on when the job runs again"
    kill -USR1 "$(cat "$job/driver" 2>/dev/null)" 2>/dev/null || kill -TERM "$step" 2>/dev/null
    wait "$step"
    # After scancel the job is no longer running and stays away.
    scontrol show job -o "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING' || fail "cancelled; submit again to go on with $name"
    scontrol requeue "$SLURM_JOB_ID" || fail "could not requeue; submit again to go on with $name"
    exit 0
}
trap stop_and_requeue USR1 TERM

wait "$step"
code="$(cat "$job/code" 2>/dev/null)" || fail "Ray did not start on all $SLURM_NNODES nodes; the lines above say why"
[ "$code" -eq 0 ] || say "the sweep $name ended with exit code $code"
exit "$code"
