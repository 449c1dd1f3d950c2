#!/usr/bin/env bash
# Machines that come and go: the same command on each, whenever it is there.
#
#   bash launch/elastic.sh examples/train_gpt.py --checkpoints /shared/runs/gpt
#
# When a machine joins, leaves or fails, all workers are told to leave (SIGTERM; the examples save,
# for which torchrun gives them 30 seconds), and start again on the machines that are there, from
# the newest checkpoint. The machine of the endpoint must stay. A machine that dies is missed after
# 15 seconds. The checkpoints must lie in a folder that all machines share.
set -euo pipefail
machines=${MACHINES:-1:4}         # at least, and at most
endpoint=${ENDPOINT:-node1:29400} # a name or address of the machine that stays, and a free port
job=${JOB:-gpt}                   # another name for each job that uses this endpoint
processes=${PROCESSES:-auto}      # on each machine: one for each GPU or core, or a number
restarts=${RESTARTS:-100}         # after failures, and where workers left before they were told
last_call=${LAST_CALL:-30}        # seconds to wait for more machines once there are enough
leaving=${LEAVING:-120}           # seconds to save in, when this machine itself is told to leave
# Where a machine has several networks, which one to use:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$leaving
# Else a machine that joins later waits for ever, and the others with it (seen in torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$machines" --nproc-per-node "$processes" --max-restarts "$restarts" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$job" \
    --rdzv-conf "last_call_timeout=$last_call" "$@"
