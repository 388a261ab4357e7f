#!/bin/bash
# Unrun: nobody has submitted this; a test reads it with `bash -n`.
#   sbatch --nodes 2 launch/slurm.sh style.yaml --engine.parallel context:2
#SBATCH --job-name=mochi-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@300
#SBATCH --requeue
# SIGTERM comes 300 s before the end: training saves after its step and leaves; requeued, it goes on from there. The run's
# folder and the cache must lie where every node sees them.
set -euo pipefail

config=$1
shift
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Otherwise the workers of a restart find the addresses of those before in the agents' store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node 8 \
    --max-restarts 1 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" \
    train.py --config "$config" "$@"
