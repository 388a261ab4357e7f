#!/bin/bash
# Unrun: nobody has submitted this; tests read it with `bash -n` and start it with an srun and a scontrol of their own.
#   sbatch --nodes 2 launch/slurm.sh style.yaml --engine.parallel context:2
#SBATCH --job-name=mochi-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# 300 s before the time limit this script hears USR1 (scancel's TERM would look the same as a limit's): training gets TERM, saves
# after its step and leaves; the job goes back into the queue and goes on from there. The run's folder, the cache and the base
# must lie on a disk that all nodes share. Where a node's own name resolves to 127.0.1.1 (Debian, Ubuntu), export
# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, the network interface between the nodes: gloo groups stand beside NCCL's.
set -euo pipefail

config=$1
shift
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Since Slurm 22.05 srun does not take --cpus-per-task over from the job: torchrun and its workers would share one core.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# Otherwise the workers of a restart find the addresses of those before in the agents' store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun kills its workers 30 s after it passed TERM on, and a step with its checkpoint may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280
if ! python -c 'from torch.distributed.launcher.api import LaunchConfig as Launch; Launch.shutdown_timeout' 2> /dev/null; then
    echo "slurm.sh: this torch ends its workers 30 s after TERM, whatever their step still takes; the job then goes on from its" \
        "last checkpoint. Take torch 2.12 or newer, or a smaller train.checkpoint_every" >&2
fi

out_of_time=
trap 'out_of_time=yes; kill -TERM "$work" || true' USR1
# Not `exec`, and in the background: bash runs a trap only between commands, or within `wait`.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node 8 \
    --max-restarts 1 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" \
    train.py --config "$config" "$@" &
work=$!
status=0
wait "$work" || status=$?
if [ -n "$out_of_time" ]; then # the trap ended the first wait; srun's own status comes now
    status=0
    wait "$work" || status=$?
    if [ "$status" -ne 0 ]; then
        # Slurm requeues by itself after a node's failure only.
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
