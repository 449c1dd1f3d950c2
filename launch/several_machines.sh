#!/usr/bin/env bash
# Several machines that find each other: the same command on each of them, in any order.
#
#   bash launch/several_machines.sh examples/train_gpt.py --checkpoints /shared/runs/gpt
#
# The checkpoints must lie in a folder that all machines share.
set -euo pipefail
machines=${MACHINES:-2}
endpoint=${ENDPOINT:-node1:29400} # a name or address of one of them, and a port that is free there
job=${JOB:-gpt}                   # another name for each job that uses this endpoint
processes=${PROCESSES:-auto}      # on each machine: one for each GPU or core, or a number
# Where a machine has several networks, which one to use:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

exec torchrun --nnodes "$machines" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$job" "$@"
