#!/bin/bash
# Agents of a W&B sweep on this machine. From the top of the repository:
#
#   launch/sweep.sh configs/sweeps/grid.yaml              check the sweep, register it, one agent for each GPU
#   launch/sweep.sh --per node configs/sweeps/grid.yaml   one agent, whose trials take all GPUs
#   launch/sweep.sh ENTITY/PROJECT/SWEEP                  more agents of a sweep, on this machine or another
#
# An agent ends when the sweep does. One that loses W&B's server is started again, until it has failed for an hour.
# Ctrl-C or a SIGTERM stops the trials, each at its next step, and then the agents. The sweep stays at W&B, to go on later.
set -u

per=gpu
if [ "${1:-}" = --per ]; then per=$2; shift 2; fi
if [ $# -ne 1 ] || { [ "$per" != gpu ] && [ "$per" != node ]; }; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi

sweep=$1
if [ -f "$sweep" ]; then
    python -m trainer sweep "$sweep" --check || exit
    # wandb prints the id in a sentence on stderr: "Run sweep agent with: wandb agent ENTITY/PROJECT/SWEEP"
    output=$(wandb sweep "$sweep" 2>&1) || { printf '%s\n' "$output" >&2; exit 1; }
    printf '%s\n' "$output"
    sweep=$(sed -n 's/.*wandb agent \([^[:space:]]*\).*/\1/p' <<<"$output" | tail -n 1)
fi

# Otherwise an agent gives up a sweep whose first trials fail.
export WANDB_AGENT_DISABLE_FLAPPING=true WANDB_AGENT_MAX_INITIAL_FAILURES=1000000

pause=${SWEEP_PAUSE:-30} # seconds between two tries
tries=$((3600 / pause))
stopping=
agents=()

agent() { # run one agent, again and again until the sweep is over
    local child='' left=$tries began
    trap 'stopping=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM
    while [ -z "$stopping" ]; do # setsid: a Ctrl-C reaches an agent once, through this shell
        began=$SECONDS
        setsid wandb agent --forward-signals --term-timeout 60 "$sweep" &
        child=$!
        wait "$child" && return 0
        while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends the first wait
        [ -n "$stopping" ] && return 143
        [ $((SECONDS - began)) -gt 300 ] && left=$tries
        left=$((left - 1))
        [ $left -le 0 ] && { echo "the agent failed for an hour; is the sweep $sweep there?" >&2; return 1; }
        echo "the agent ended; another one starts in $pause s" >&2
        sleep "$pause" &
        child=$!
        wait "$child"
    done
    return 143
}

stop() {
    stopping=1
    kill -TERM "${agents[@]}" 2>/dev/null
}
trap stop INT TERM

gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')}
gpus=${gpus//,/ }
if [ "$per" = node ] || [ -z "$gpus" ]; then
    agent & agents+=($!)
else
    for gpu in $gpus; do
        (export CUDA_VISIBLE_DEVICES=$gpu; agent) & agents+=($!)
    done
fi

status=0
for one in "${agents[@]}"; do
    wait "$one" || status=$?
    while kill -0 "$one" 2>/dev/null; do wait "$one" || status=$?; done
done
[ -n "$stopping" ] && exit 143
exit $status
