# shellcheck shell=bash
# The facts of this cluster; the only file in this folder to edit. The batch scripts read it, their tasks on all
# nodes inherit it, and `python -m slurm.submit` reads it before it calls sbatch. A variable that is set already
# stays as it is. ONEMESH_HOME is the checkout: the folder that a job is submitted from, unless it is set.

# The virtual environment, on a file system that every node sees.
export ONEMESH_VENV="${ONEMESH_VENV:-$ONEMESH_HOME/.venv}"

# Ranks on a node. Without it: as many as the job has GPUs there, one if it has none.
# export RANKS_PER_NODE="${RANKS_PER_NODE:-8}"

# The network interfaces that ranks talk through, e.g. eth0 and ib0. Without them gloo takes the address that
# the node's own name resolves to (some systems make that a loopback address: preflight refuses it), NCCL looks
# for the fastest.
# export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-eth0}"
# export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-ib0}"

# What sbatch asks for unless told otherwise (any of its SBATCH_* variables); for `python -m slurm.submit`.
# export SBATCH_ACCOUNT="${SBATCH_ACCOUNT:-project}"
# export SBATCH_PARTITION="${SBATCH_PARTITION:-gpu}"
# export SBATCH_GPUS_PER_NODE="${SBATCH_GPUS_PER_NODE:-8}"

# Modules the cluster needs, e.g. a CUDA driver library.
# module load cuda

export PATH="$ONEMESH_VENV/bin:$PATH"
export PYTHONPATH="$ONEMESH_HOME${PYTHONPATH:+:$PYTHONPATH}"
