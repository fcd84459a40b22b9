#!/bin/bash
# A node's part of a job, started by srun once per node: torchrun.sh train|serve KEY=VALUE...
set -euo pipefail

# A request to stop reaches every process of the node. Torchrun must not act on it (it would end the ranks), nor
# may a rank that is still starting; a rank that can save sets a handler, which this does not prevent.
trap '' USR1

# The head node is where the batch script and therefore srun run.
head=$SLURM_LAUNCH_NODE_IPADDR
port=$((15000 + SLURM_JOB_ID % 15000))
export RANKS_PER_NODE="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"

ONEMESH_ADDRESS=$(python -m slurm.preflight "$head" "$port")
export ONEMESH_ADDRESS

exec torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$RANKS_PER_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0))" --local-addr="$ONEMESH_ADDRESS" \
    -m slurm.worker "$@"
