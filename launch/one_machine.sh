#!/usr/bin/env bash
# One machine: a process for each GPU, or for each core where there is none.
#
#   bash launch/one_machine.sh examples/train_gpt.py --checkpoints runs/gpt
set -euo pipefail
processes=${PROCESSES:-auto} # auto, or a number

exec torchrun --standalone --nproc-per-node "$processes" "$@"
