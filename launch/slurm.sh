#!/bin/bash
# A Slurm job of one task for each GPU, on one machine or several. From the top of the repository:
#
#   sbatch launch/slurm.sh configs/digits.yaml run.name=first
#   sbatch --nodes=2 launch/slurm.sh configs/digits.yaml run.name=first
#
# Two minutes before its time is up, or when it is cancelled or preempted, the run gets a SIGTERM, keeps a
# checkpoint and ends with status 143. The same line goes on from there, on any number of GPUs; after
# preemption or a node's failure Slurm does so by itself, for which run.dir must lie on a shared disk: rank 0 may be
# on another machine then. Every machine needs the data. See docs/multi-gpu.md.
# Give your cluster's --partition and --account to sbatch, and activate your environment before.

#SBATCH --job-name=lockstep
#SBATCH --output=lockstep-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=$SLURM_NTASKS
OMP_NUM_THREADS=1
export MASTER_ADDR MASTER_PORT WORLD_SIZE OMP_NUM_THREADS

trap : TERM # the tasks get their own; this shell waits for them

# Each task becomes its rank, without a launcher between: a signal reaches it, and its exit status comes back.
# --wait: when one has ended, the others have two minutes to end too. srun does not inherit --cpus-per-task.
# shellcheck disable=SC2016 # for the task's shell to expand
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=120 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python train.py "$@"
' train.py "$@" run.resume=auto
