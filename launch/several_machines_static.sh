#!/usr/bin/env bash
# Several machines with fixed numbers, the number as the first argument:
#
#   bash launch/several_machines_static.sh 0 examples/train_gpt.py --checkpoints /shared/runs/gpt
#   bash launch/several_machines_static.sh 1 examples/train_gpt.py --checkpoints /shared/runs/gpt
#
# The checkpoints must lie in a folder that all machines share. Machine 0 has rank 0.
set -euo pipefail
machines=${MACHINES:-2}
first=${FIRST:-node1}        # the name or address of machine 0
port=${PORT:-29500}          # free on machine 0
processes=${PROCESSES:-auto} # on each machine: one for each GPU or core, or a number
# Where a machine has several networks, which one to use:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

number=$1
shift
exec torchrun --nnodes "$machines" --node-rank "$number" --nproc-per-node "$processes" \
    --master-addr "$first" --master-port "$port" "$@"
