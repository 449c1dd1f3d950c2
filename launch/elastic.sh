#!/usr/bin/env bash
# Machines that come and go: the same command on each, whenever it is there.
#
#   bash launch/elastic.sh examples/train_gpt.py --checkpoints /shared/runs/gpt
#
# When a machine joins, leaves or fails, all workers are told to leave (SIGTERM; the examples save),
# and start again on those that are there, from the newest checkpoint. The machine of the endpoint
# must stay. The checkpoints must lie in a folder that all machines share.
set -euo pipefail
machines=${MACHINES:-1:4}         # at least, and at most
restarts=${RESTARTS:-100}         # after failures
endpoint=${ENDPOINT:-node1:29400} # a name or address of the machine that stays, and a free port
job=${JOB:-gpt}                   # another name for each job that uses this endpoint
processes=${PROCESSES:-auto}      # on each machine: one for each GPU or core, or a number
last_call=${LAST_CALL:-30}        # seconds to wait for more machines once there are enough
leaving=${LEAVING:-120}           # seconds for a save; then workers are killed
# Where a machine has several networks, which one to use:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

exec torchrun --nnodes "$machines" --nproc-per-node "$processes" --max-restarts "$restarts" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$job" \
    --rdzv-conf "last_call_timeout=$last_call" --shutdown-timeout "$leaving" "$@"
